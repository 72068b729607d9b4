"""Warm start: a search begins at the weighted mean of another study's best trials.

The other study is read once. The result is recorded in the new study, which does not need the other one afterwards.
This file knows two studies and their parameters; it knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.open import open_study, storage_error, storage_url
from optuna_merge.storage.trials import score_or_worst


@dataclass(frozen=True)
class WarmStart:
    """The start that another study gives.

    Attributes:
        study: Name of the other study.
        trials: Numbers of its best trials, the best first.
        params: The parameters that both studies have, with the weighted mean over these trials, clipped to the range
            in the new study.
    """

    study: str
    trials: tuple[int, ...]
    params: Mapping[str, float]

    def describe(self, n_dimensions: int) -> str:
        """One line for the user."""
        trials = f"trial {self.trials[0]}" if len(self.trials) == 1 else f"the {len(self.trials)} best trials"
        return f"from {trials} of study {self.study!r}, {len(self.params)} of {n_dimensions} weights"


def record_warm_start(study: optuna.Study, config: StudyConfig, space: SearchSpace) -> Mapping[str, float]:
    """The start that a study's ``search.warm_start`` gives; read from the other study and recorded at the first call.

    Args:
        study: The new study.
        config: Its study file.
        space: Its search space.

    Returns:
        Parameter name to value; empty without ``search.warm_start``.

    Raises:
        StudyError: If the other study cannot be used; see :func:`find_warm_start`.
    """
    if config.search.warm_start is None:
        return {}
    if attributes.WARM_START not in study.user_attrs:
        study.set_user_attr(attributes.WARM_START, asdict(_read(config, space)))
    params: Mapping[str, float] = study.user_attrs[attributes.WARM_START]["params"]
    return params


def find_warm_start(config: StudyConfig, space: SearchSpace) -> WarmStart | None:
    """The start that ``search.warm_start`` gives, without recording it; None if the study file has no such key.

    Args:
        config: The study file. If its study has been started, the recorded start is returned.
        space: Its search space.

    Raises:
        StudyError: If the other study has not been started, is this very study, does not maximise a single value, has
            no complete merge, or shares no parameter with this one.
    """
    if config.search.warm_start is None:
        return None
    try:
        own = open_study(storage_url(config.storage_path, config.study.storage), config.study.name)
        recorded = own.user_attrs.get(attributes.WARM_START)
    except StudyError:
        recorded = None
    if recorded is None:
        return _read(config, space)
    return WarmStart(recorded["study"], tuple(recorded["trials"]), recorded["params"])


def _read(config: StudyConfig, space: SearchSpace) -> WarmStart:
    where, wanted = f"{config.path}: search.warm_start", config.search.warm_start
    assert wanted is not None
    if wanted.file is None:
        assert wanted.storage is not None
        assert wanted.study is not None
        url, name = wanted.storage, wanted.study
    else:
        other = load_study(wanted.file)
        url, name = storage_url(other.storage_path, other.study.storage), other.study.name
    if (url, name) == (storage_url(config.storage_path, config.study.storage), config.study.name):
        raise StudyError(f"{where} must be another study, got {name!r} itself; name one that has ended")
    try:
        study = open_study(url, name)
    except StudyError as exc:
        raise StudyError(f"{where}: {exc}") from exc
    try:
        directions, trials = study.directions, study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    except Exception as exc:
        raise storage_error(url, exc) from exc
    if directions != [optuna.study.StudyDirection.MAXIMIZE]:
        got = ", ".join(direction.name.lower() for direction in directions)
        raise StudyError(f"{where} must be a study that maximises one value, study {name!r} has {got}; choose another")
    merges = [trial for trial in trials if trial.params]
    if not merges:
        raise StudyError(
            f"{where} must be a study with a merge that was scored on every document, study {name!r} has none; run it"
            " first"
        )
    best = sorted(merges, key=lambda trial: (-score_or_worst(trial), trial.number))[: wanted.n_best]
    shared = [name for name in space.distributions if all(name in trial.params for trial in best)]
    if not shared:
        raise StudyError(
            f"{where} must be a study with parameters of this one, such as {next(iter(space.distributions), 'none')},"
            f" study {name!r} has {min(best[0].params)} and the like; models' names, layer_granularity"
            " and filters must agree"
        )
    weights = _recombination_weights(len(best))
    return WarmStart(
        name, tuple(trial.number for trial in best), {name: _mean(best, weights, name, space) for name in shared}
    )


def _recombination_weights(n: int) -> list[float]:
    """The weights of CMA-ES for the better half of a generation: log(n + 1/2) - log(rank), normalised to sum to 1."""
    raw = [math.log(n + 0.5) - math.log(rank) for rank in range(1, n + 1)]
    return [weight / math.fsum(raw) for weight in raw]


def _mean(trials: Sequence[FrozenTrial], weights: Sequence[float], name: str, space: SearchSpace) -> float:
    value = math.fsum(weight * trial.params[name] for weight, trial in zip(weights, trials, strict=True))
    distribution = space.distributions[name]
    return min(max(value, distribution.low), distribution.high)
