"""SCE: selects the elements that vary most, weights models by their change, and erases minority signs."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput
from optuna_merge.methods.selection import Quantity, Split, split_by
from optuna_merge.methods.sparsifier import Sums, dot


def sce(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted mean of the selected entries that agree with the elected sign.

    Among the elements in which the task vectors vary at all, it selects the fraction ``select_topk`` with the largest
    variance. A model's weight is its share of the sum of squares of the selected entries.

    References:
        FuseChat 3.0's SCE, arXiv:2408.07990.
    """
    models = range(len(inputs.models))
    selected = _selection(inputs)
    energies = [Sums() for _ in models]
    for block in inputs.blocks():
        for index, sparse in enumerate(_sparse(block, selected)):
            energies[index].add(dot(sparse, sparse))
    n_elements = max(1, inputs.models[0].numel())
    means = [energy.total() / n_elements for energy in energies]
    total_energy = sum(means)
    weights = [mean / total_energy if total_energy >= 1e-6 else 1 / len(means) for mean in means]
    flat = out.view(-1)
    for chunk in inputs.chunks():
        sparse_vectors = _sparse(chunk, selected)
        total = chunk.zeros("total")
        for sparse in sparse_vectors:
            total += sparse
        sign = torch.ge(total, 0, out=chunk.scratch("sign")).mul_(2).sub_(1)
        total.zero_()
        divisor = chunk.zeros("divisor")
        for index in models:
            agreeing = sparse_vectors[index].mul_(sign).clamp_(min=0)
            total.add_(agreeing, alpha=weights[index])
            divisor.add_(agreeing.sign_(), alpha=weights[index])
        flat[chunk.span] = total.mul_(sign).div_(divisor.clamp_(min=1e-6)).add_(chunk.base)


def _selection(inputs: MergeInput) -> Split | None:
    fraction = inputs.shared["select_topk"]
    if fraction >= 1:
        return None
    n_varying = sum(int(_variance(chunk).count_nonzero()) for chunk in inputs.chunks())
    n_selected = int(torch.tensor(n_varying) * max(fraction, 0.0))
    quantity = Quantity(("variance", *inputs.identities), _variance)
    return split_by(inputs, quantity, n_selected, is_early=True)


def _variance(chunk: Chunk) -> Tensor:
    return torch.var(torch.stack(_vectors(chunk)), dim=0, unbiased=False)


def _vectors(chunk: Chunk) -> list[Tensor]:
    return [
        chunk.scratch(f"vector_{index}").copy_(chunk.task_vector(index)) for index in range(len(chunk.inputs.models))
    ]


def _sparse(chunk: Chunk, selected: Split | None) -> list[Tensor]:
    vectors = _vectors(chunk)
    if selected is not None:
        mask = selected.keep(chunk, _variance(chunk)).sign_()
        for vector in vectors:
            vector *= mask
    return vectors
