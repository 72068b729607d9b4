"""Merged tensors for whoever is told by text: what a worker process of an engine imports and calls.

The text of a source says which models are open, the text of a request is a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from optuna_merge.checkpoints.reference import ResolvedReference
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe

FACTORY = "optuna_merge.merging.worker:open_source"
"""Import path of :func:`open_source`."""


def describe_source(models: Iterable[ResolvedReference], tokenizer_source: str | None, device: str) -> str:
    """The text that :func:`open_source` opens models from, in whatever process of this machine.

    Args:
        models: The first is the one that the others are compared with: the base, if there is one.
        tokenizer_source: As of ``Merger``.
        device: Where to merge; ``auto``: where the asking worker is.
    """
    return json.dumps(
        {"models": [_to_plain(model) for model in models], "tokenizer_source": tokenizer_source, "device": device}
    )


def open_source(argument: str, device: str) -> Callable[[str], Iterator[tuple[str, Tensor]]]:
    """Open the models of a description.

    Args:
        argument: What :func:`describe_source` returned.
        device: Of the worker.

    Returns:
        From the JSON of a recipe to its merged tensors, each a new one.

    Raises:
        CheckpointError: If a model cannot be opened.
    """
    data = json.loads(argument)
    merger = Merger.open(
        [_from_plain(model) for model in data["models"]],
        device=device if data["device"] == "auto" else data["device"],
        tokenizer_source=data["tokenizer_source"],
    )
    return lambda recipe: merger.merge(Recipe.from_json(recipe))


def _to_plain(model: ResolvedReference) -> dict[str, Any]:
    return {
        "reference": model.reference,
        "name": model.name,
        "path": str(model.path),
        "is_local": model.is_local,
        "adapter": None if model.adapter is None else _to_plain(model.adapter),
    }


def _from_plain(data: dict[str, Any]) -> ResolvedReference:
    adapter = data["adapter"]
    return ResolvedReference(
        data["reference"],
        data["name"],
        Path(data["path"]),
        data["is_local"],
        None if adapter is None else _from_plain(adapter),
    )
