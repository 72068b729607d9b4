"""The trials that a study begins with: the ascent, and what the search must beat.

Enqueues them once, and the rest of them if a process died meanwhile. Knows the storage's trials and the search spaces;
runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.config.contradictions import gradient_problems
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.search.race import Race, RaceSchedule, Spaces
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import ascent_trial
from optuna_merge.storage.claims import Planned, enqueue


def enqueue_ascent(study: optuna.Study, config: StudyConfig, *, has_gradient: bool) -> None:
    """Enqueue the ascent, unless the study has one or has drawn merges already.

    Args:
        study: The study.
        config: The study file.
        has_gradient: Whether any metric has a gradient.

    Raises:
        StudyError: If the study file races methods, or there is no gradient.
    """
    if len(config.method_names) > 1:
        raise StudyError(
            f"{config.path}: genome.merge_method must be one method for an ascent at the beginning, got"
            f" {', '.join(config.method_names)}; name one, or set search.start: ascent, so that MergeObjective.plan"
            " enqueues an ascent after the race"
        )
    for problem in gradient_problems(config):
        rule = problem.rule.replace("be uniform for", "not be used with")
        raise StudyError(f"{config.path}: an ascent must {rule}; {problem.fix}")
    if not has_gradient:
        raise StudyError(
            f"{config.path}: an ascent must have a metric with a gradient, got none; name right answers with"
            " gradient_target in the metadata of a task"
        )
    trials = study.get_trials(deepcopy=False)
    if _has_drawn_none(trials) and ascent_trial(trials) is None:
        enqueue(study, [Planned({}, {attributes.ASCENT: True})])


def enqueue_baselines(study: optuna.Study, spaces: Spaces, make_schedule: Callable[[], RaceSchedule]) -> None:
    """Enqueue the baselines, unless the study has all of them or has drawn merges already.

    Args:
        study: The study.
        spaces: The search space of each of its methods.
        make_schedule: Makes the schedule of its race; called only if there are several methods.
    """
    trials = study.get_trials(deepcopy=False)
    if _has_drawn_none(trials):
        n_enqueued = sum(attributes.BASELINE in trial.user_attrs for trial in trials)
        enqueue(study, _baselines(spaces, make_schedule)[n_enqueued:])


def _has_drawn_none(trials: Sequence[FrozenTrial]) -> bool:
    first = (attributes.BASELINE, attributes.ASCENT)
    return all(any(key in trial.user_attrs for key in first) for trial in trials)


def _baselines(spaces: Spaces, make_schedule: Callable[[], RaceSchedule]) -> list[Planned]:
    baselines = next(iter(spaces.values())).baselines
    planned = [
        Planned(one.params, {attributes.BASELINE: one.name, attributes.BASELINE_KIND: one.kind}) for one in baselines
    ]
    if len(spaces) == 1:
        return planned
    others = [each for each, one in zip(planned, baselines, strict=True) if one.kind != "uniform"]
    return [Race(spaces).first(make_schedule()), *others]
