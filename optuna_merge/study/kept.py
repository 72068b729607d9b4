"""What a study's method makes once and keeps for all trials: where it lies, and what it costs.

Knows shapes and the speed of this machine; opens no model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optuna_merge.config.study_config import StudyConfig

_SAMPLE = 384  # rows and columns of the matrix that is decomposed to see how fast this machine is
_DOUBLE_BYTES, _FLOAT_BYTES = 8, 4


@dataclass(frozen=True)
class KeptPlan:
    """What it costs to make and to keep the matrices of a method.

    Attributes:
        folder: Where they are kept, as files that are mapped into memory.
        n_bytes: Bytes on disk; each merge reads them instead of the sources.
        seconds: Estimate of how long the first merge takes to make them on this machine, from a sample.
        memory: Bytes of host memory that making the largest needs.
        disk_free: Bytes that are free where the folder is, or will be.
    """

    folder: str
    n_bytes: int
    seconds: float
    memory: int
    disk_free: int


def matrices_folder(config: StudyConfig) -> Path:
    """The folder of the matrices that a method makes once."""
    return config.storage_path / "matrices"


def plan_kept(config: StudyConfig, shapes: Iterable[Sequence[int]]) -> KeptPlan | None:
    """Calculate what a study's methods keep; None if they keep nothing.

    Args:
        config: The study file.
        shapes: Shapes of the merged model's tensors.
    """
    n_models = len(config.sources)
    costs = {"nothing": (0, 0), "a matrix": (1, 1), "a matrix for each model": (n_models, n_models + 2)}
    found = [costs[method.keeps] for method in config.methods]
    n_kept, n_decomposed = (sum(part) for part in zip(*found, strict=True))
    matrices = [(max(shape), min(shape)) for shape in shapes if len(shape) == 2 and min(shape) > 0]
    if not n_kept or not matrices:
        return None
    n_elements = [n_rows * n_columns for n_rows, n_columns in matrices]
    eigen, product = _seconds_of_a_sample()
    # Eigenvectors of n columns take time in proportion to n^3, products of [m, n] by n columns to m n^2.
    seconds = sum(
        n_decomposed * (eigen * n_columns**3 + 3 * product * n_rows * n_columns**2) for n_rows, n_columns in matrices
    )
    return KeptPlan(
        folder=str(matrices_folder(config)),
        n_bytes=n_kept * _FLOAT_BYTES * sum(n_elements),
        seconds=seconds,
        memory=(2 * n_models + 4) * _DOUBLE_BYTES * max(n_elements),
        disk_free=_disk_free(matrices_folder(config)),
    )


def _disk_free(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _seconds_of_a_sample() -> tuple[float, float]:
    """Seconds of an eigendecomposition, and of a product of two matrices, both divided by the cube of their size."""
    matrix = torch.eye(_SAMPLE, dtype=torch.float64) + torch.arange(_SAMPLE) / _SAMPLE**2
    torch.linalg.eigh(matrix[:8, :8])  # the first call loads the library
    start = time.perf_counter()
    square = matrix.T @ matrix
    middle = time.perf_counter()
    torch.linalg.eigh(square)
    end = time.perf_counter()
    return (end - middle) / _SAMPLE**3, (middle - start) / _SAMPLE**3
