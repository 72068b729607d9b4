"""RAM: averages the entries that several models change, and adds those that only one model changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optuna_merge.methods.elementwise import write
from optuna_merge.methods.function import MergeInput

_N_REMEMBERED = 4  # thresholds whose counts are kept for each tensor
_LEAST_DIVISOR = 1e-12


def ram(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the mean of the task vectors that change an entry.

    A task vector changes an entry if its magnitude exceeds ``epsilon``. So an entry that one model changes is added as
    it is, one that several change is averaged over these, and one that none changes stays the base's.

    References:
        Behavior Knowledge Merge in Reinforced Agentic Models, arXiv:2601.13572, RAM: selective merging of the shared,
        unique and unchanged sets. As in mergekit, the threshold is a parameter.
    """
    _write(inputs, out, [1.0] * len(inputs.models))


def ramplus_tl(inputs: MergeInput, out: Tensor) -> None:
    """As :func:`ram`, but model ``i`` adds the entries that only it changes times ``1 + r min(alpha, rho_i)``.

    ``rho_i`` is the number of entries of the tensor that model ``i`` changes together with others, divided by the
    number that only it changes.

    References:
        arXiv:2601.13572, RAM+: distribution-aware rescaling. Departure, as in mergekit: the paper counts over the whole
        model; we count within a tensor, so that tensors can be streamed.
    """
    r, alpha, epsilon = (inputs.shared[name] for name in ("r", "alpha", "epsilon"))
    factors = []
    for n_shared, n_unique in _counts(inputs):
        rho = n_shared / max(n_unique, epsilon, _LEAST_DIVISOR)  # mergekit divides by epsilon if n_unique is 0
        factors.append(1 + r * min(rho, alpha))
    _write(inputs, out, factors)


def _write(inputs: MergeInput, out: Tensor, factors: Sequence[float]) -> None:
    write(inputs, out, _merged, [inputs.shared["epsilon"], *factors])


def _merged(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    base = stored[0].float()
    changes, n_changes = [], torch.zeros_like(base)
    for model in stored[1:]:
        change = model.float() - base
        is_unchanged = change.abs() <= floats[0]  # false for NaN, which so stays in the result
        changes.append(torch.where(is_unchanged, 0.0, change))
        n_changes = n_changes + torch.where(is_unchanged, 0.0, 1.0)
    divisor = torch.where(n_changes > 1, n_changes, 1.0)
    total = torch.zeros_like(base)
    for index, change in enumerate(changes):
        total = total + torch.where(n_changes > 1, change / divisor, change * floats[1 + index])
    return base + total


def _counts(inputs: MergeInput) -> list[tuple[int, int]]:
    """For each model, how many entries it changes together with others, and how many only it changes."""
    epsilon = inputs.shared["epsilon"]
    key = ("entries that a model changes", *inputs.identities, inputs.name)
    counts: dict[float, list[tuple[int, int]]] = inputs.memory.setdefault(key, {})
    if epsilon not in counts:
        if len(counts) == _N_REMEMBERED:
            del counts[next(iter(counts))]
        models = range(len(inputs.models))
        totals = torch.zeros((len(models), 2), dtype=torch.int64, device=inputs.device)
        for chunk in inputs.chunks():
            is_changed = torch.stack([~(chunk.task_vector(index).abs_() <= epsilon) for index in models])
            is_shared = is_changed.sum(0) > 1
            totals[:, 0] += (is_changed & is_shared).sum(1)
            totals[:, 1] += (is_changed & ~is_shared).sum(1)
        counts[epsilon] = [(shared, unique) for shared, unique in totals.tolist()]
    return counts[epsilon]
