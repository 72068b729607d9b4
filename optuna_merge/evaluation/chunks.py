"""Documents cut into chunks of equal composition."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.api.instance import Instance

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engine import Engine, Prepared
from optuna_merge.evaluation.leaf import _Leaf, _random
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import Documents
from optuna_merge.evaluation.term import _Goal, _leaves

MAX_CHUNKS = 50
MIN_CHUNK_REQUESTS = 8
MAX_CHUNK_COST = 1.1
"""What all chunks may cost together, over all documents at once: short ones are padded more and fill no batch."""


class _Batch:
    """Documents that are answered by one call of the engine."""

    def __init__(self, engine: Engine, parts: Sequence[tuple[_Leaf, list[int]]]) -> None:
        self.parts = [(leaf, doc_ids) for leaf, doc_ids in parts if doc_ids]
        self._counts = [sum(i.repeats or 1 for d in ids for i in leaf.instances[d]) for leaf, ids in self.parts]
        self.prepared: Prepared = engine.prepare(_requests(self.parts))

    def score(self, engine: Engine) -> Documents:
        responses = iter(engine.respond(self.prepared))
        with quietly():
            return {
                leaf.name: leaf.score(doc_ids, iter([next(responses) for _ in range(count)]))
                for (leaf, doc_ids), count in zip(self.parts, self._counts, strict=True)
            }


def _chunks(engine: Engine, goals: Sequence[_Goal], n_chunks: int | None, min_requests: int, seed: int) -> list[_Batch]:
    leaves = _leaves(goals)
    # every eval task needs a document in every chunk, or chunks would measure different things
    most = min(sum(len(leaf.searched) for leaf in goal.leaves) for goal in goals)
    if n_chunks is not None:
        if not 1 <= n_chunks <= most:
            raise TaskError(
                f"n_chunks must be between 1 and {most} (the documents of the smallest task), got {n_chunks}; lower it"
            )
        return _cut(engine, leaves, n_chunks, seed)
    [whole] = _cut(engine, leaves, 1, seed)
    full = whole.prepared.n_tokens / engine.batch_tokens
    n = max(1, min(MAX_CHUNKS, most, whole.prepared.n_requests // min_requests, int(full)))
    while n > 1:
        chunks = _cut(engine, leaves, n, seed)
        if sum(chunk.prepared.cost for chunk in chunks) <= MAX_CHUNK_COST * whole.prepared.cost:
            return chunks
        n -= max(1, n // 8)
    return [whole]


def _cut(engine: Engine, leaves: Sequence[_Leaf], n_chunks: int, seed: int) -> list[_Batch]:
    """Deal every leaf's documents evenly over the chunks, at random but the same for every trial."""
    chunks: list[list[tuple[_Leaf, list[int]]]] = [[] for _ in range(n_chunks)]
    dealt = 0
    for leaf in leaves:
        order = _random(seed, "chunks", leaf.name).sample(leaf.searched, len(leaf.searched))
        hands: list[list[int]] = [[] for _ in range(n_chunks)]
        for doc_id in order:
            hands[dealt % n_chunks].append(doc_id)
            dealt += 1
        for chunk, hand in zip(chunks, hands, strict=True):
            chunk.append((leaf, sorted(hand)))
    return [_Batch(engine, chunk) for chunk in chunks]


def _requests(parts: Sequence[tuple[_Leaf, Sequence[int]]]) -> list[Instance]:
    instances = [instance for leaf, doc_ids in parts for doc_id in doc_ids for instance in leaf.instances[doc_id]]
    return [instance for instance in instances for _ in range(instance.repeats or 1)]


def _joined(parts: Sequence[Documents]) -> Documents:
    joined: Documents = {}
    for part in parts:
        for name, columns in part.items():
            into = joined.setdefault(name, {key: [] for key in columns})
            for key, values in columns.items():
                into[key] = into[key] + values
    return joined


def _in_document_order(documents: Documents) -> Documents:
    ordered: Documents = {}
    for name, columns in documents.items():
        order = sorted(range(len(columns["doc_id"])), key=columns["doc_id"].__getitem__)
        ordered[name] = {key: [values[i] for i in order] for key, values in columns.items()}
    return ordered
