"""A metric's values for single documents, converted to plain JSON values and back.

A tuple becomes ``{"tuple": [...]}`` and a mapping ``{"dict": {...}}``, so that an aggregation gets what it expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from optuna_merge.errors import TaskError


def to_plain(value: Any, task: str, metric: str) -> Any:
    """A document's value as JSON can hold it.

    Args:
        value: What the task's ``process_results`` returned.
        task: Name of the task, for the error.
        metric: Name of the metric, for the error.

    Raises:
        TaskError: If the value is not made of numbers and texts.
    """
    if value is None or isinstance(value, bool | int | float | str):
        # numpy's float64 is a float too; this makes it Python's
        return float(value) if isinstance(value, float) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return {"tuple": [to_plain(v, task, metric) for v in value]}
    if isinstance(value, list):
        return [to_plain(v, task, metric) for v in value]
    if isinstance(value, Mapping):
        return {"dict": {str(k): to_plain(v, task, metric) for k, v in value.items()}}
    raise TaskError(
        f"task '{task}': metric '{metric}' must be made of numbers and texts, got {type(value).__name__}; "
        "return something that JSON can hold"
    )


def from_plain(value: Any) -> Any:
    """The value that :func:`to_plain` was given; arrays stay lists."""
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if isinstance(value, dict):
        [(kind, content)] = value.items()
        if kind == "tuple":
            return tuple(from_plain(v) for v in content)
        return {k: from_plain(v) for k, v in content.items()}
    return value
