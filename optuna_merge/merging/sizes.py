"""How many elements are merged at a time, and how many bytes are staged at a time."""

from __future__ import annotations

PIECE_ELEMENTS = 1 << 24
"""Elements of a piece on a GPU, in float32."""

KERNEL_ELEMENTS = 1 << 26
"""Elements of a piece on a GPU for compiled arithmetic, which needs no float32 copies."""

SLOPE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements that are differentiated at a time. Some five float32 pieces for each model are held then; on a CPU they
should stay in its cache."""

HELD_BYTES = 1 << 27
"""Up to so many bytes of gradients are added up before they are multiplied with the models."""

STAGED_BYTES = 1 << 29
"""Up to this many bytes, the tensors that all models have under one name are copied to a GPU whole; else in pieces."""

SCRATCH_PIECES = 6
"""Float32 pieces that a method holds at a time if it is not compiled entirely."""
