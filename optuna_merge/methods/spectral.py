"""Methods that work on the singular vectors of task matrices: TSV-Merge and Iso-C.

A task matrix is the task vector of a tensor with two axes. What the models give is decomposed once, in float64, and
kept as float32 matrices of the tensor's shape (``kept.py``); a merge only adds these, times its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from optuna_merge.errors import NonFiniteMergeError
from optuna_merge.methods.elementwise import write
from optuna_merge.methods.function import MergeInput

_LEAST_VALUE = 1e-6  # of the largest singular value: smaller ones are rounding, as in a task matrix of low rank
_LEAST_EIGENVALUE = 1e-10  # of the largest eigenvalue: directions that two models share
_DOUBLE = torch.float64


def tsv_m(inputs: MergeInput, out: Tensor) -> None:
    """Write ``base + lambda sum_i weight_i M_i``, with ``M_i`` the task matrix of model ``i`` made apart from the rest.

    With ``n`` models, each task matrix ``U_i S_i V_i^T`` is cut to the ``floor(rank / n)`` largest singular values, at
    least one. The left vectors of all models together, ``U``, are replaced by the nearest matrix with orthonormal
    columns, ``U (U^T U)^(-1/2)``, and so are the right ones; ``M_i`` is the product of what became of its own vectors,
    with its singular values. A tensor without two axes gets ``lambda / n`` times the weighted sum of the task vectors.

    References:
        Task Singular Vectors, arXiv:2412.00081, TSV-Merge. With all weights 1 this is the paper's merge and ``lambda``
        its scaling factor. Departures: weights; singular values below a millionth of the largest are left out, and so
        are directions that equal vectors of two models leave open, which the authors' second decomposition fills with
        any vectors: so models of low rank, equal models and unchanged rows give no noise.
    """
    n_models, weights, scale = len(inputs.models), inputs.per_model["weight"], inputs.shared["lambda"]
    if not _is_matrix(inputs):
        write(inputs, out, _plus_task_vectors, [scale * weight / n_models for weight in weights])
        return
    stacked = _kept(inputs, "tsv_m", _apart)
    write(inputs.of(inputs.base, tuple(stacked)), out, _plus_matrices, [scale * weight for weight in weights])


def iso_c(inputs: MergeInput, out: Tensor) -> None:
    """Write ``base + lambda s U V^T``, where ``U S V^T`` is the sum of the task matrices and ``s`` its mean value.

    So all directions of the sum become equally long. A tensor without two axes gets ``lambda`` times the mean of the
    task vectors.

    References:
        No Task Left Behind, arXiv:2502.04959, Iso-C (section "Isotropic merging in common subspace"); ``lambda`` is the
        paper's scaling factor. As in the paper, models have no weights, because the directions of a weighted sum would
        have to be found anew in each merge. Departure: directions whose singular value is below a millionth of the
        largest are left out, where the authors' code makes them as long as the others; they count in the mean.
    """
    n_models, scale = len(inputs.models), inputs.shared["lambda"]
    if not _is_matrix(inputs):
        write(inputs, out, _plus_task_vectors, [scale / n_models] * n_models)
        return
    (isotropic,) = _kept(inputs, "iso_c", _isotropic)
    write(inputs.of(inputs.base, (isotropic,)), out, _plus_matrices, [scale])


def _is_matrix(inputs: MergeInput) -> bool:
    return inputs.models[0].dim() == 2 and inputs.models[0].numel() > 0


def _kept(inputs: MergeInput, method: str, make: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The matrices that a method adds, float32, shape ``[n, *shape]``: made from tall task matrices and kept."""

    def made() -> Tensor:
        base, *models = (tensor.to("cpu", _DOUBLE) for tensor in _stored(inputs))
        is_tall = base.shape[0] >= base.shape[1]
        changes = [model - base if is_tall else (model - base).T for model in models]
        if not all(bool(change.isfinite().all()) for change in changes):
            raise NonFiniteMergeError(
                f"{inputs.name}: every model must be finite, got NaN or infinity; this merge cannot be scored"
            )
        matrices = make(changes)
        return (matrices if is_tall else matrices.mT).contiguous()

    return inputs.kept.get((method, inputs.name, *inputs.identities, str(tuple(inputs.models[0].shape))), made)


def _stored(inputs: MergeInput) -> tuple[Tensor, ...]:
    assert inputs.base is not None
    return inputs.base, *inputs.models


def _apart(changes: list[Tensor]) -> Tensor:
    """The matrices ``M_i`` of :func:`tsv_m`, from task matrices of shape ``[m, n]`` with ``m >= n``."""
    n_kept = max(1, changes[0].shape[1] // len(changes))
    left, values, right = zip(*(_largest(change, n_kept) for change in changes), strict=True)
    orthogonal = [torch.split(_orthogonal(torch.cat(vectors, dim=1)), n_kept, dim=1) for vectors in (left, right)]
    return torch.stack([((u * s) @ v.T).float() for u, s, v in zip(orthogonal[0], values, orthogonal[1], strict=True)])


def _isotropic(changes: list[Tensor]) -> Tensor:
    """The matrix ``s U V^T`` of :func:`iso_c`, shape ``[1, m, n]``."""
    left, values, right = _largest(torch.stack(changes).sum(0), changes[0].shape[1])
    return ((left * values.mean()) @ right.T).float()[None]


def _largest(matrix: Tensor, n_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The left vectors, values and right vectors of the largest singular values of ``[m, n]``, ``m >= n``.

    Returns:
        Shapes ``[m, n_kept]``, ``[n_kept]`` and ``[n, n_kept]``; zeros where a value is negligible.
    """
    # From the eigenvectors of the small Gram matrix, which in float64 keeps more digits than the float32 models have,
    # and is faster than a decomposition in float32.
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    values = squares.flip(0)[:n_kept].clamp(min=0).sqrt()
    is_kept = values > _LEAST_VALUE * values[0]
    values = torch.where(is_kept, values, 0.0)
    right = vectors.flip(1)[:, :n_kept] * is_kept
    return matrix @ (right / torch.where(is_kept, values, 1.0)), values, right


def _orthogonal(vectors: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, as far as the columns are independent; shape ``[m, k]``."""
    values, directions = torch.linalg.eigh(vectors.T @ vectors)
    is_kept = values > _LEAST_EIGENVALUE * max(float(values[-1]), math.ulp(0.0))
    scaled = directions * torch.where(is_kept, values, 1.0).rsqrt() * is_kept
    result: Tensor = vectors @ (scaled @ directions.T)
    return result


def _plus_matrices(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    base, *matrices = stored
    total = matrices[0] * floats[0]
    for index, matrix in enumerate(matrices[1:], start=1):
        total = total + matrix * floats[index]
    return base.float() + total


def _plus_task_vectors(
    stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
) -> Tensor:
    base = stored[0].float()
    return _plus_matrices((base, *(model.float() - base for model in stored[1:])), extras, floats, integers)
