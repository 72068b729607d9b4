"""Whether checkpoints can be merged tensor by tensor, and what differs. Reads headers and vocabularies, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.tensor_names import is_buffer
from optuna_merge.errors import CheckpointError

_N_SHOWN = 10


def compare(checkpoints: Sequence[Checkpoint], tokenizer_source: str | None = None) -> list[str]:
    """Find everything that keeps checkpoints from being merged tensor by tensor.

    Args:
        checkpoints: The others are compared with the first: the base, if there is one.
        tokenizer_source: If None, all models must have the same vocabulary.

    Returns:
        One line for each difference; none if they can be merged.
    """
    first, *others = checkpoints
    problems: list[str] = []
    for other in others:
        if found := _compare_configs(first, other):
            problems += found  # then all tensors differ too, which tells nothing new
        else:
            problems += _compare_tensors(first, other, rows_may_differ=tokenizer_source is not None)
    if tokenizer_source is None:
        problems += _compare_vocabularies(checkpoints)
    return problems


def check_compatible(checkpoints: Sequence[Checkpoint], tokenizer_source: str | None = None) -> None:
    """Raise an error if :func:`compare` finds a difference.

    Raises:
        CheckpointError: With one line for each of the first ten, and the number of the others.
    """
    problems = compare(checkpoints, tokenizer_source)
    if problems:
        n_more = len(problems) - _N_SHOWN
        more = [f"and {n_more} more differences; merge models of one architecture and size"] if n_more > 0 else []
        raise CheckpointError("\n".join(problems[:_N_SHOWN] + more))


def common_names(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Names of the tensors that all checkpoints have, in the order of the first."""
    return tuple(name for name in checkpoints[0].names if all(name in checkpoint for checkpoint in checkpoints))


def _compare_configs(first: Checkpoint, other: Checkpoint) -> list[str]:
    for key in ("architectures", "model_type"):
        ours, theirs = first.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            return [f"{key} must match {first.reference} ({_plain(ours)}), got {_plain(theirs)} in {other.reference}"]
    if first.n_layers != other.n_layers:
        where = f"in {other.reference}"
        return [f"number of layers must match {first.reference} ({first.n_layers}), got {other.n_layers} {where}"]
    return []


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _compare_tensors(first: Checkpoint, other: Checkpoint, *, rows_may_differ: bool) -> list[str]:
    problems = []
    for name in first.names:
        if name in other:
            problems += _compare_tensor(name, first, other, rows_may_differ=rows_may_differ)
        elif not is_buffer(name):
            problems.append(f"{name}: must be in every model, is in {first.reference} but not in {other.reference}")
    problems += [
        f"{name}: must be in every model, is in {other.reference} but not in {first.reference}"
        for name in other.names
        if name not in first and not is_buffer(name)
    ]
    return problems


def _compare_tensor(name: str, first: Checkpoint, other: Checkpoint, *, rows_may_differ: bool) -> list[str]:
    ours, theirs = first.shape(name), other.shape(name)
    if ours != theirs:
        where = f"must match {first.reference} {list(ours)}, got {list(theirs)} in {other.reference}"
        if not _differ_in_vocabulary(ours, theirs, first, other):
            return [f"{name}: shape {where}"]
        return [] if rows_may_differ else [f"{name}: vocabulary rows {where}; set tokenizer_source"]
    if first.dtype(name).is_floating_point != other.dtype(name).is_floating_point:
        dtypes = f"must match {first.reference} {first.dtype(name)}, got {other.dtype(name)} in {other.reference}"
        return [f"{name}: dtype {dtypes}"]
    return []


def _differ_in_vocabulary(ours: tuple[int, ...], theirs: tuple[int, ...], first: Checkpoint, other: Checkpoint) -> bool:
    sizes = (first.vocab_size, other.vocab_size)
    return bool(ours and theirs) and ours[1:] == theirs[1:] and (ours[0], theirs[0]) == sizes


def _compare_vocabularies(checkpoints: Sequence[Checkpoint]) -> list[str]:
    known = [(checkpoint, vocabulary) for checkpoint in checkpoints if (vocabulary := checkpoint.vocabulary())]
    if not known:
        return []
    (first, ours), *others = known
    problems = []
    for other, theirs in others:
        different = sorted(
            (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
            key=lambda token: (min(ours.get(token, 1 << 62), theirs.get(token, 1 << 62)), token),
        )
        if different:
            shown = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {theirs.get(t, 'none')})" for t in different[:3])
            problems.append(
                f"vocabulary of {other.reference} must equal that of {first.reference}, {len(different)} tokens have "
                f"another id: {shown}{', ...' if len(different) > 3 else ''}; set tokenizer_source"
            )
    return problems
