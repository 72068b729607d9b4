"""Which documents of a task are used: the first ones or a random draw, and the share held out.

Every draw is seeded by the study's seed, its purpose and the task, so that no draw depends on another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lm_eval.api.task import Task

from optuna_merge.errors import TaskError
from optuna_merge.internals.lm_eval import get_sample_size


def random_for(seed: int, purpose: str, task: str) -> random.Random:
    """The generator of one draw for one task."""
    return random.Random(f"{seed}/{purpose}/{task}")


def select(name: str, task: Task, limit: int | float | None, *, shuffle: bool, seed: int) -> list[int]:
    """Numbers of the documents that are used, in ascending order.

    Args:
        name: Name of the task.
        task: The task, with its documents.
        limit: Documents to use at most, or their share if below 1, as in lm-eval; None: all.
        shuffle: Draw them at random instead of taking the first ones.
        seed: Seeds the draw.

    Raises:
        TaskError: If no document is left.
    """
    n = len(task.eval_docs)
    size = get_sample_size(task, limit)
    size = n if size is None else min(size, n)
    if size < 1:
        raise TaskError(f"task '{name}': no documents are left ({n} in its split, limit {limit}); raise limit")
    if not shuffle:
        return list(range(size))
    return sorted(random_for(seed, "shuffle", name).sample(range(n), size))


def hold_out(task: str, selected: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split a task's documents at random.

    Args:
        task: Name of the task.
        selected: Its documents.
        share: Share of them that is held out, in (0, 1); at least one document is.
        seed: Seeds the draw.

    Returns:
        Documents to search, and held-out documents, in the order of ``selected``.

    Raises:
        TaskError: If none is left to search.
    """
    n = len(selected)
    n_holdout = max(1, round(share * n))
    if n_holdout >= n:
        raise TaskError(
            f"task '{task}': holdout {share} of {n} documents leaves none to search; lower holdout or raise limit"
        )
    drawn = set(random_for(seed, "holdout", task).sample(list(selected), n_holdout))
    return [i for i in selected if i not in drawn], [i for i in selected if i in drawn]
