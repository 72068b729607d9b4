"""The section ``study``: the Optuna study.

Knows how long and with which sampler and pruner to search; does not open a storage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from optuna_merge.config.paths import StorageUrl
from optuna_merge.config.pruner import PrunerConfig, WilcoxonConfig
from optuna_merge.config.sampler import PARETO_SAMPLER, CmaEsConfig, SamplerConfig
from optuna_merge.config.section import Section

_NAME_BYTES = 200
"""A file name has at most 255 bytes; those of locks have the name of the storage's file too."""


class StudyOptions(Section):
    """The Optuna study.

    Attributes:
        name: Name in the storage; empty: the study file's name.
        n_trials: Trials in total, baselines included; a second run continues up to it.
        n_workers: Processes that will run the study at the same time, on all machines; decides the population size.
        seed: Decides every draw, split and mask of the study.
        sampler, pruner: By name, or with options.
        storage: Optuna storage URL; None: an SQLite file in ``storage_path``.
        timeout: Seconds after which no further trial starts.
        n_chunks: Number of parts into which the documents of one evaluation are cut; None: by the number of documents.
        goal: ``sum``: maximise one score; ``pareto``: maximise each objective of the tasks separately.
    """

    name: str = ""
    n_trials: int = Field(100, ge=1)
    n_workers: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    sampler: SamplerConfig = CmaEsConfig()
    pruner: PrunerConfig = WilcoxonConfig()
    storage: StorageUrl | None = None
    timeout: float | None = Field(None, gt=0)
    n_chunks: int | None = Field(None, ge=1)
    goal: Literal["sum", "pareto"] = "sum"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_goal(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("goal") != "pareto":
            return value
        defaults = {"sampler": PARETO_SAMPLER, "pruner": "none"}
        return {**value, **{key: default for key, default in defaults.items() if value.get(key) is None}}

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
            raise ValueError("a name that can be part of a file name")
        if len(value.encode("utf-8", "surrogatepass")) > _NAME_BYTES:
            raise ValueError(f"a name of at most {_NAME_BYTES} bytes, because files are named after it")
        return value

    @property
    def cmaes(self) -> CmaEsConfig:
        """The options of CMA-ES; the defaults if another sampler draws the weights."""
        return self.sampler if isinstance(self.sampler, CmaEsConfig) else CmaEsConfig()
