"""Opens a merger from plain text: what an engine's worker process imports and calls.

One text describes the models to open, and each request is a recipe as JSON. This file knows nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from optuna_merge.checkpoints.reference import ResolvedReference
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe

FACTORY = "optuna_merge.merging.worker:open_merger"
"""Import path of :func:`open_merger`."""


def describe_merger(
    models: Iterable[ResolvedReference], tokenizer_source: str | None, device: str, keep_in: Path | None = None
) -> str:
    """Describe the models of a merge as text, for :func:`open_merger` in any process of this machine.

    Args:
        models: The first is the one that the others are compared with: the base, if there is one.
        tokenizer_source: As for ``Merger``.
        device: Device to merge on; ``auto`` means the device of the worker that opens the models.
        keep_in: As for ``Merger``.
    """
    return _DESCRIPTION.dump_json(_Description(tuple(models), tokenizer_source, device, keep_in)).decode()


def open_merger(description: str, device: str) -> Callable[[str], Iterator[tuple[str, Tensor]]]:
    """Open the models of a description.

    Args:
        description: What :func:`describe_merger` returned.
        device: The worker's device.

    Returns:
        A function that turns the JSON of a recipe into its merged tensors, each a new tensor.

    Raises:
        CheckpointError: If a model cannot be opened.
    """
    described = _DESCRIPTION.validate_json(description)
    merger = Merger.open(
        described.models,
        device=device if described.device == "auto" else described.device,
        tokenizer_source=described.tokenizer_source,
        keep_in=described.keep_in,
    )
    return lambda recipe: merger.merge(Recipe.from_json(recipe))


@dataclass(frozen=True)
class _Description:
    models: tuple[ResolvedReference, ...]
    tokenizer_source: str | None
    device: str
    keep_in: Path | None


_DESCRIPTION = TypeAdapter(_Description)
