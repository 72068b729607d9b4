"""Random masks that are functions: of a seed, the tensor's name, the model and the element's index.

A hash of a counter needs no state, so CPU and CUDA, the search and the export, and any cutting into pieces see the
same mask.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput

LEVELS = 1 << 16
"""Number of values that :func:`uniform` takes."""


Key = tuple[int, int]
"""Two signed 32-bit integers."""


def key_of(inputs: MergeInput, index: int) -> Key:
    """The key of the mask of one source's tensor."""
    digest = hashlib.sha256(f"{inputs.seed}\0{inputs.name}\0{inputs.identities[index]}".encode()).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:8], "little", signed=True),
    )


def uniform(chunk: Chunk, key: Key) -> Tensor:
    """Independent uniform integers for the elements of a piece.

    Returns:
        int16, shape ``[n]``, each of the ``LEVELS`` values from -32768 to 32767 equally likely; valid until the next
        call.
    """
    # Two elements share a 32-bit hash; a piece may begin or end within a pair.
    first, last = chunk.span.start // 2, (chunk.span.stop + 1) // 2
    counter = chunk.inputs.integers("counter", last - first)
    torch.arange(first, last, dtype=torch.int32, device=counter.device, out=counter)
    bits = _mix(counter, chunk.inputs.integers("shifted", last - first), key)
    skip = chunk.span.start - 2 * first
    return bits.view(torch.int16)[skip : skip + chunk.span.stop - chunk.span.start]


def _mix(bits: Tensor, shifted: Tensor, key: Key) -> Tensor:
    """A 32-bit integer hash with an avalanche in every bit (C. Wellons, "lowbias32"), keyed, in place."""
    for part, shift, factor in ((key[0], 16, 0x7FEB352D), (key[1], 15, -0x7B935975)):
        bits ^= part
        _xor_shifted(bits, shifted, shift)
        bits *= factor
    return _xor_shifted(bits, shifted, 16)


def _xor_shifted(bits: Tensor, shifted: Tensor, shift: int) -> Tensor:
    torch.bitwise_right_shift(bits, shift, out=shifted)
    shifted &= (1 << (32 - shift)) - 1  # the shift of a signed integer repeats its sign
    bits ^= shifted
    return bits


def kept(chunk: Chunk, key: Key, n_kept: int) -> Tensor:
    """1 for the elements whose :func:`uniform` is among the ``n_kept`` smallest of its values, 0 for the others.

    Returns:
        float32, shape ``[n]``; valid until the next call.
    """
    return chunk.scratch("kept").copy_(uniform(chunk, key).lt_(n_kept - LEVELS // 2))
