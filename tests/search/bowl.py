"""A bowl to search: its space, its bottom, and studies of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import FloatDistribution

from optuna_merge.search.samplers import StableCmaEsSampler

SPACE = {
    "a": FloatDistribution(-1, 1),
    "b": FloatDistribution(0, 10),
    "c": FloatDistribution(0.5, 0.7),
    "d": FloatDistribution(-5, 5),
}
POPSIZE = 8  # 4 + floor(3 ln 4)


def loss(params: Mapping[str, float]) -> float:
    """A bowl with its bottom at a quarter of each range; all terms alike once ranges are mapped to [0, 1]."""
    return sum(((params[name] - d.low) / (d.high - d.low) - 0.25) ** 2 for name, d in SPACE.items())


def suggest(trial: optuna.Trial, names: list[str] | None = None) -> dict[str, float]:
    return {name: trial.suggest_float(name, SPACE[name].low, SPACE[name].high) for name in names or list(SPACE)}


def objective(trial: optuna.Trial) -> float:
    return loss(suggest(trial))


def made(sampler: optuna.samplers.BaseSampler | None = None, **options: Any) -> optuna.Study:
    return optuna.create_study(sampler=sampler or StableCmaEsSampler(SPACE, seed=5), **options)


def points(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]
