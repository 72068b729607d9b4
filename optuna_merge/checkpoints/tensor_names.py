"""What tensor names tell: which layer a tensor belongs to, or which end of the model. Has no table of architectures.

In a decoder, the index of the layer is a component of the tensor name (``model.layers.3.mlp...``,
``transformer.h.3.attn...``, ``gpt_neox.layers.3...``). The part before the index is the layer stack. A tensor outside
the stack is an embedding if its name says so; otherwise it belongs to the head (final norm, output projection).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from optuna_merge.errors import CheckpointError
from optuna_merge.recipe import Role

_EMBEDDING = re.compile(r"emb(?!ed_out)|\bw[tp]e\b")
_TIMES = 2  # so many times the tensors of any other numbered list has the stack of layers
_OTHER_SENSE = re.compile("vision|visual|image|audio|speech")
_BUFFER = re.compile(r"\.rotary_emb\.|\.(attn|attention|self_attn)\.(masked_)?bias$|\.position_ids$")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a model: its role, and its layer if the role is ``"layer"``."""

    role: Role
    layer: int | None = None


def find_layer_stack(names: Collection[str], n_layers: int | None = None) -> str:
    """Find the prefix of the layers' tensor names, such as ``"model.layers."``.

    Layers that see or hear are left out. Of several numbered lists of that length, the layers have by far the most
    tensors.

    Args:
        names: All tensor names of a checkpoint, in any order.
        n_layers: Number of layers, if known; tells a decoder from an encoder in the same checkpoint.

    Raises:
        CheckpointError: If no prefix, or more than one, is followed by the indices 0 to n - 1.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        prefix, index = _split(name)
        if index is not None:
            indices.setdefault(prefix, set()).add(index)
    stacks = [
        prefix
        for prefix, found in sorted(indices.items())
        if found == set(range(len(found))) and (n_layers is None or len(found) == n_layers)
    ]
    stacks = [prefix for prefix in stacks if not _OTHER_SENSE.search(prefix)] or stacks
    n_tensors = {prefix: sum(name.startswith(prefix) for name in names) for prefix in stacks}
    largest = sorted(stacks, key=n_tensors.__getitem__, reverse=True)
    if len(stacks) == 1 or (stacks and n_tensors[largest[0]] >= _TIMES * n_tensors[largest[1]]):
        return largest[0]
    seen = {prefix: len(found) for prefix, found in sorted(indices.items())}
    wanted = "one stack of layers" if n_layers is None else f"one stack of {n_layers} layers"
    raise CheckpointError(f"tensor names must hold {wanted}, found {seen or 'no layer index'}; is this a decoder?")


def place_of(name: str, stack: str) -> Place:
    """Find the place of the tensor ``name`` in a model whose layers are named ``stack`` + index."""
    prefix, index = _split(name)
    if index is not None and prefix == stack:
        return Place("layer", index)
    return Place("embedding" if _EMBEDDING.search(name) else "head")


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that only some checkpoints store: rotary frequencies, masks, position numbers."""
    return bool(_BUFFER.search(f".{name}"))


def _split(name: str) -> tuple[str, int | None]:
    parts: Sequence[str] = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]) + ("." if position else ""), int(part)
    return "", None
