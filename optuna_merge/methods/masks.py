"""Random masks as functions of a seed, the tensor's name, the model and the element's index.

A hash of a counter has no state. So the mask is the same on CPU and CUDA, in the search and in the export, and for
any cut into pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput

LEVELS = 1 << 16
"""Number of values that :func:`uniform` can return."""

N_INTEGERS = 4
"""Number of integers that :func:`uniform` needs."""


def mask_integers(inputs: MergeInput, index: int) -> Callable[[slice], tuple[int, ...]]:
    """A function of a piece, given as a slice, to the integers from which :func:`uniform` makes one source's mask."""
    digest = hashlib.sha256(f"{inputs.seed}\0{inputs.name}\0{inputs.identities[index]}".encode()).digest()
    first_key = int.from_bytes(digest[:4], "little", signed=True)
    second_key = int.from_bytes(digest[4:8], "little", signed=True)
    # Two elements share a 32-bit hash, and a piece may start or end within such a pair.
    return lambda span: (first_key, second_key, span.start // 2, span.start % 2)


def uniform(like: Tensor, integers: Tensor) -> Tensor:
    """Independent uniform integers for the elements of a piece.

    Args:
        like: A tensor of the piece, shape ``[n]``.
        integers: Two keys, the number of whole pairs before the piece, and that of further elements before it (0 or
            1); int32, shape ``[4]``.

    Returns:
        int32, shape ``[n]``, each of the ``LEVELS`` values from 0 to 65535 equally likely.
    """
    place = torch.arange(like.shape[0], dtype=torch.int32, device=like.device) + integers[3]
    bits = _mix((place >> 1) + integers[2], integers[0], integers[1])
    half = torch.where((place & 1) == 1, bits >> 16, bits) & (LEVELS - 1)
    return half ^ (LEVELS // 2)


def _mix(bits: Tensor, first_key: Tensor, second_key: Tensor) -> Tensor:
    """A 32-bit integer hash with an avalanche in every bit (C. Wellons, "lowbias32"), keyed."""
    for key, shift, factor in ((first_key, 16, 0x7FEB352D), (second_key, 15, -0x7B935975)):
        bits = bits ^ key
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 16)


def _shifted(bits: Tensor, shift: int) -> Tensor:
    return (bits >> shift) & ((1 << (32 - shift)) - 1)  # shifting a signed integer repeats its sign
