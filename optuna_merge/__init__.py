"""Evolutionary merging of language models as an Optuna study."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna_merge.config.read import load_study
    from optuna_merge.config.study_config import StudyConfig
    from optuna_merge.errors import OptunaMergeError
    from optuna_merge.recipe import Recipe
    from optuna_merge.report.trackers import Tracker
    from optuna_merge.search.named import RepeatableSampler
    from optuna_merge.search.samplers import StableCmaEsSampler
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import run_study

__all__ = [
    "MergeObjective",
    "OptunaMergeError",
    "Recipe",
    "RepeatableSampler",
    "StableCmaEsSampler",
    "StudyConfig",
    "Tracker",
    "load_study",
    "run_study",
]

_HOMES = {
    "MergeObjective": "study.objective",
    "OptunaMergeError": "errors",
    "Recipe": "recipe",
    "RepeatableSampler": "search.named",
    "StableCmaEsSampler": "search.samplers",
    "StudyConfig": "config.study_config",
    "Tracker": "report.trackers",
    "load_study": "config.read",
    "run_study": "study.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing the package loads neither torch nor Optuna."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"optuna_merge.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'optuna_merge' has no attribute {name!r}")
