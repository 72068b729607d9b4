"""The sections ``tasks`` and ``holdout``: which eval tasks are scored, during the search and after it.

Knows how a task is written; does not know which tasks exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from optuna_merge.config.section import YAML_LIST, Section


class TaskConfig(Section):
    """One eval task, or a group of them, that counts towards an objective.

    Attributes:
        name: As lm-eval knows it.
        weight: Its factor in the score, which is the sum of weight x metric; negative: minimise the metric.
        metric: ``metric,filter`` as in lm-eval's results, or ``n_tokens``: the mean length of generated answers.
        metadata: Passed to the task's own ``custom_dataset`` function.
        objective: With ``goal: pareto``, the objective it counts towards; empty: one of its own, named like the task,
            and with the metric where a task is named twice.
    """

    name: str = Field(min_length=1)
    weight: float = 1.0
    metric: str = "acc,none"
    objective: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class HoldoutConfig(Section):
    """What only the final report scores.

    Attributes:
        fraction: Part of each task's documents that is held out, in (0, 1); None if ``tasks`` are given.
        tasks: Other eval tasks, all of whose documents are held out.
    """

    fraction: float | None = Field(None, gt=0, lt=1)
    tasks: Annotated[tuple[TaskConfig, ...], YAML_LIST] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"tasks": value}
        if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
            raise ValueError("a fraction between 0 and 1, or a list of tasks")
        return {"fraction": float(value)} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check(self) -> HoldoutConfig:
        if (self.fraction is None) == (not self.tasks):
            raise ValueError("either a fraction between 0 and 1 or a list of tasks")
        return self
