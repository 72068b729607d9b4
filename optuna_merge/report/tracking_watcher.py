"""Tells a tracker what happens in a study, and which figures each trial has. Loads no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import first_line
from optuna_merge.report.trackers import Tracker
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import best_merge, generation, score_of
from optuna_merge.study.watcher import Watcher


class TrackingWatcher(Watcher):
    """Tells a tracker what happens, until the tracker fails for the first time.

    Args:
        tracker: The tracker.
        config: The study file.
        best_file: The mergekit file of the best merge.
        warn: Is told, once, why the tracker failed.
    """

    def __init__(self, tracker: Tracker, config: StudyConfig, best_file: Path, warn: Callable[[str], None]) -> None:
        self._tracker = tracker
        self._config = config
        self._best_file = best_file
        self._warn = warn
        self._works = True
        self._started = False

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Start the tracker."""
        self._started = True
        self._try(lambda: self._tracker.start(study.study_name, self._config.model_dump(mode="json")))

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Log the trial's figures; save the best merge's file if the trial is the best."""
        self._try(lambda: self._tracker.log(figures_of(study, trial), trial.number))
        if is_best:
            self._try(lambda: self._tracker.save(self._best_file))

    def close(self) -> None:
        """Finish the run, however the study ended."""
        if self._started:
            self._try(self._tracker.finish)

    def _try(self, call: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as exc:
            self._works = False
            name = type(self._tracker).__name__
            self._warn(f"tracker {name} failed and gets no more figures: {first_line(exc)[:200]}")


def figures_of(study: optuna.Study, trial: FrozenTrial) -> dict[str, float]:
    """What is logged after a trial.

    Returns:
        Of the study: ``best_score`` and ``total_documents``. Of the trial: ``score``, or ``estimate`` if it was pruned;
        ``score/<task>``; ``objective/<name>`` if there are several; ``merge_s``, ``evaluation_s``, ``n_documents``,
        ``pruned`` and ``failed``. Of its generation so far: ``generation``, ``population_mean`` and
        ``population_std``. A figure that is unknown is left out.
    """
    trials = study.get_trials(deepcopy=False)
    best = best_merge(study)
    scores = {"best_score": None if best is None else score_of(best), "score": score_of(trial)}
    return {
        "pruned": float(trial.state == TrialState.PRUNED),
        "failed": float(trial.state == TrialState.FAIL),
        "total_documents": sum(other.user_attrs.get(attributes.DOCUMENTS, 0) for other in trials),
        **{name: score for name, score in scores.items() if score is not None},
        **_objective_figures(study, trial),
        **_recorded_figures(trial.user_attrs),
        **_generation_figures(trials, trial),
    }


def _objective_figures(study: optuna.Study, trial: FrozenTrial) -> dict[str, float]:
    if trial.values is None or len(trial.values) == 1:
        return {}
    names = study.metric_names or []
    return {f"objective/{name}": value for name, value in zip(names, trial.values, strict=True)}


def _recorded_figures(user_attrs: Mapping[str, float]) -> dict[str, float]:
    """The figures that a trial records in its attributes."""
    names = {PAIRED_ESTIMATE: "estimate"}
    names |= {key: key for key in (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS, attributes.DOCUMENTS)}
    prefix = f"{attributes.SCORE} "
    names |= {key: f"score/{key.removeprefix(prefix)}" for key in user_attrs if key.startswith(prefix)}
    return {name: user_attrs[key] for key, name in names.items() if key in user_attrs}


def _generation_figures(trials: list[FrozenTrial], trial: FrozenTrial) -> dict[str, float]:
    drawn_in = generation(trial)
    if drawn_in is None:
        return {}
    figures: dict[str, float] = {"generation": drawn_in}
    population = [other for other in trials if generation(other) == drawn_in]
    values = [other.user_attrs.get(PAIRED_ESTIMATE, score_of(other)) for other in population]
    known = [value for value in values if value is not None]
    if known:
        figures["population_mean"] = statistics.fmean(known)
        figures["population_std"] = statistics.pstdev(known)
    return figures
