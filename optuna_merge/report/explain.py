"""Which layer groups and models matter: Optuna's parameter importances, summed. Loads no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.report.pictures import Bars, HeatMap, Picture
from optuna_merge.search.ascent import N_PASSES
from optuna_merge.search.race import trials_of_winner
from optuna_merge.search.space import split_parameter
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import ascent_trial, steps_of
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import score_of

_MIN_TRIALS = 10


@dataclass(frozen=True)
class Importances:
    """How much each parameter contributes to what sets good merges apart. The shares sum to 1.

    Attributes:
        study: Name of the study.
        n_trials: Number of trials that were compared, pruned ones with their estimates.
        parameters: Parameter to its share, largest first.
        groups: Layer group to the sum of its parameters' shares, from the first layer on.
        models: Model (or method parameter that belongs to no model) to the sum of its shares, largest first.
        slopes: Parameter to the derivative of the expected score by it, on the documents of the ascent's first step and
            over its last pass, the largest first; empty without an ascent.
    """

    study: str
    n_trials: int
    parameters: dict[str, float]
    groups: dict[str, float]
    models: dict[str, float]
    slopes: dict[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def explain(study: optuna.Study) -> Importances:
    """Compare the best tenth of a study's merges with all of them, parameter by parameter (PED-ANOVA).

    A share tells how much the best tenth prefers some values of a parameter, not which values. It misses parameters
    that matter only together. CMA-ES does not draw uniformly, and the shares reflect that too.

    Args:
        study: The study; pruned trials count with their paired estimates. Of a race only the winner's merges count.

    Raises:
        StudyError: If fewer than 10 merges have a score or an estimate, or nothing is searched.

    References:
        PED-ANOVA, arXiv:2304.10255; Optuna's ``PedAnovaImportanceEvaluator``.
    """
    merges = trials_of_winner(study.get_trials(deepcopy=False))
    trials = [scored for trial in merges if (scored := _scored(trial)) is not None]
    if len(trials) < _MIN_TRIALS:
        raise StudyError(
            f"study {study.study_name!r} must have {_MIN_TRIALS} merges with a score to be explained,"
            f" got {len(trials)}; run more trials"
        )
    shares = _shares(study.study_name, trials)
    labels = study.user_attrs.get(attributes.FINGERPRINT, {}).get("genome.models", [])
    groups: dict[str, float] = defaultdict(float)
    models: dict[str, float] = defaultdict(float)
    for name in sorted(shares):
        group, column = split_parameter(name)
        groups[group] += shares[name]
        model = next((label for label in labels if column == label or column.startswith(f"{label}.")), column)
        models[model] += shares[name]
    return Importances(
        study.study_name,
        len(trials),
        _largest_first(shares),
        dict(groups),
        _largest_first(models),
        _slopes(study),
    )


def pictures_of(importances: Importances) -> list[Picture]:
    """The shares as a heat map of layer groups by models, and their sums as bars."""
    columns: dict[str, dict[str, float]] = defaultdict(dict)
    for name, share in importances.parameters.items():
        group, column = split_parameter(name)
        columns[column][group] = share
    names = sorted(columns, key=lambda column: -math.fsum(columns[column].values()))
    return [
        HeatMap(
            "importance",
            "Where it matters which weight a merge has",
            "share of the importance",
            names,
            list(importances.groups),
            [[columns[column].get(group) for column in names] for group in importances.groups],
            0.0,
            round(max(importances.parameters.values()), 4) or 1.0,
        ),
        Bars(
            "importance-groups",
            "By layer group",
            "share",
            [(name, "merge", share, None) for name, share in importances.groups.items()],
        ),
        Bars(
            "importance-models",
            "By model",
            "share",
            [(name, "best", share, None) for name, share in importances.models.items()],
        ),
    ]


def _slopes(study: optuna.Study) -> dict[str, tuple[float, float]]:
    trial = ascent_trial(study.get_trials(deepcopy=False))
    steps = steps_of(trial) if trial is not None else []
    if not steps:
        return {}
    last = steps[-max(1, len(steps) // N_PASSES) :]
    slopes = {
        name: (value, math.fsum(step.slope[name] for step in last) / len(last))
        for name, value in steps[0].slope.items()
    }
    return dict(sorted(slopes.items(), key=lambda item: (-abs(item[1][0]), item[0])))


def _shares(name: str, trials: list[FrozenTrial]) -> dict[str, float]:
    storage = optuna.storages.InMemoryStorage()  # not create_study, which logs
    study_id = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], name)
    compared = optuna.Study(storage.get_study_name_from_id(study_id), storage)
    compared.add_trials(trials)
    return optuna.importance.get_param_importances(
        compared, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), normalize=True
    )


def _largest_first(shares: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _scored(trial: FrozenTrial) -> FrozenTrial | None:
    """A complete copy of a trial with its score or estimate as the value; None if it has neither."""
    value = score_of(trial) if trial.state == TrialState.COMPLETE else trial.user_attrs.get(PAIRED_ESTIMATE)
    if value is None or not trial.params or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    return optuna.trial.create_trial(value=value, params=trial.params, distributions=trial.distributions)
