"""How many elements are merged, and bytes staged, at once."""

from __future__ import annotations

PIECE_ELEMENTS = 1 << 24
"""Elements of a tensor that are merged at a time on a GPU, in float32."""

KERNEL_ELEMENTS = 1 << 26
"""The same, by compiled arithmetic, which makes nothing on its way: as stored."""

STAGED_BYTES = 1 << 29
"""The tensors of all models that have one name are brought to a GPU whole up to this size, and in pieces beyond."""

SCRATCH_PIECES = 6
"""Pieces in float32 that a method makes which is not compiled, or not whole."""
