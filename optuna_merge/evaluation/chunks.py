"""The searched documents, cut into chunks of equal composition.

Knows how many chunks are worth their cost and which documents are in each. It does not know what a trial is.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.api.instance import Instance

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engine import Engine, Prepared, Response
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import Documents
from optuna_merge.evaluation.selection import random_for
from optuna_merge.evaluation.term import Term, leaves_of

MAX_CHUNKS = 50
MIN_CHUNK_REQUESTS = 8
MAX_CHUNK_COST = 1.1
"""Greatest cost of all chunks over that of all documents at once.

Short chunks need more padding, fill no batch, and each takes as many steps to generate its texts as all at once would.
"""


class Chunk:
    """Documents that the engine answers in one call; the holdout is one, too.

    Attributes:
        parts: Each leaf that has documents here, and their numbers.
        prepared: Their requests, prepared by the engine.
    """

    def __init__(self, engine: Engine, parts: Sequence[tuple[Leaf, list[int]]]) -> None:
        """Prepare the requests of some documents; leaves without any are left out."""
        self.parts = [(leaf, doc_ids) for leaf, doc_ids in parts if doc_ids]
        self._counts = [sum(i.repeats or 1 for d in ids for i in leaf.instances[d]) for leaf, ids in self.parts]
        self.prepared: Prepared = engine.prepare(_requests(self.parts))

    def answer(self, engine: Engine) -> list[Response]:
        """The responses to all requests for the weights that the engine holds."""
        return engine.respond(self.prepared)

    def values(self, responses: Sequence[Response], *, keep_answers: bool = False) -> Documents:
        """Document values of what :meth:`answer` gave, with what was answered if that is to be kept."""
        left = iter(responses)
        with quietly():
            return {
                leaf.name: leaf.score(doc_ids, iter([next(left) for _ in range(count)]), keep_answers=keep_answers)
                for (leaf, doc_ids), count in zip(self.parts, self._counts, strict=True)
            }


def cut(engine: Engine, terms: Sequence[Term], n_chunks: int | None, min_requests: int, seed: int) -> list[Chunk]:
    """Cut the searched documents into chunks.

    Args:
        engine: Prepares the requests.
        terms: What is scored.
        n_chunks: How many chunks; None: as many as are worth their cost.
        min_requests: Requests that a chunk should have at least, if the number is chosen here.
        seed: Seeds which documents are in which chunk.

    Raises:
        TaskError: If a task has fewer documents than there are to be chunks.
    """
    leaves = leaves_of(terms)
    # every term needs a document in every chunk, or chunks would measure different things
    most = min(sum(len(leaf.searched) for leaf in term.leaves) for term in terms)
    if n_chunks is not None:
        if not 1 <= n_chunks <= most:
            raise TaskError(
                f"n_chunks must be between 1 and {most} (the documents of the smallest task), got {n_chunks}; lower it"
            )
        return _deal(engine, leaves, n_chunks, seed)
    [whole] = _deal(engine, leaves, 1, seed)
    # generating a text takes as long as passes of this many tokens
    n_full_passes = int((whole.prepared.n_tokens + whole.prepared.text_cost) / engine.batch_tokens)
    n = max(1, min(MAX_CHUNKS, most, whole.prepared.n_requests // min_requests, n_full_passes))
    while n > 1:
        chunks = _deal(engine, leaves, n, seed)
        if sum(chunk.prepared.cost for chunk in chunks) <= MAX_CHUNK_COST * whole.prepared.cost:
            return chunks
        n -= max(1, n // 8)
    return [whole]


def _deal(engine: Engine, leaves: Sequence[Leaf], n_chunks: int, seed: int) -> list[Chunk]:
    """Deal each leaf's documents evenly over the chunks, at random but alike for every trial."""
    chunks: list[list[tuple[Leaf, list[int]]]] = [[] for _ in range(n_chunks)]
    n_dealt = 0
    for leaf in leaves:
        order = random_for(seed, "chunks", leaf.name).sample(leaf.searched, len(leaf.searched))
        hands: list[list[int]] = [[] for _ in range(n_chunks)]
        for doc_id in order:
            hands[n_dealt % n_chunks].append(doc_id)
            n_dealt += 1
        for chunk, hand in zip(chunks, hands, strict=True):
            chunk.append((leaf, sorted(hand)))
    return [Chunk(engine, chunk) for chunk in chunks]


def _requests(parts: Sequence[tuple[Leaf, Sequence[int]]]) -> list[Instance]:
    instances = [instance for leaf, doc_ids in parts for doc_id in doc_ids for instance in leaf.instances[doc_id]]
    return [instance for instance in instances for _ in range(instance.repeats or 1)]
