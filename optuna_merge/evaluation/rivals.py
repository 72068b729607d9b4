"""Documents whose answers a judge compares with a fixed one that they do not have: a model answers them first.

Knows which documents these are, and how the weights that an engine holds answer them. It does not know which model is
asked, nor where its answers are kept (``study/rivals.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.chunks import Chunk
from optuna_merge.evaluation.engine import Engine
from optuna_merge.evaluation.term import Term, aggregate, leaves_of

RivalAnswers = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Leaf to document number (a string, as in JSON) to field of the document to the answer."""


class Rivals:
    """The documents that lack the answer with which others are compared.

    Attributes:
        others: Terms of the score without such documents; they can tell which model is the best.
        n_judged: Questions that a judge is asked to score one model by them; 0 if no document lacks its answer.
    """

    def __init__(self, engine: Engine, terms: Sequence[Term], holdout_terms: Sequence[Term]) -> None:
        self._engine = engine
        self._leaves = [leaf for leaf in leaves_of([*terms, *holdout_terms]) if leaf.without_rival()]
        self.others = [term for term in terms if term.weight and not any(leaf.without_rival() for leaf in term.leaves)]
        judged = leaves_of(self.others) if self._leaves else []
        self.n_judged = sum(leaf.n_judged(leaf.searched) for leaf in judged)

    def __bool__(self) -> bool:
        """Whether any document lacks its fixed answer."""
        return bool(self._leaves)

    def score_others(self) -> float:
        """Score the weights that the engine holds on the searched documents of :attr:`others`.

        Raises:
            TaskError, EngineError, JudgeError: As ``Scorer.score_chunk``.
        """
        chunk = Chunk(self._engine, [(leaf, leaf.searched) for leaf in leaves_of(self.others)])
        return aggregate(self.others, chunk.values(chunk.answer(self._engine)), stderr=False).value

    def answer(self) -> RivalAnswers:
        """What the weights that the engine holds answer to the documents that lack an answer.

        Raises:
            TaskError: If a task's filter raises.
            EngineError: If the engine holds no complete weights or cannot answer.
        """
        chunk = Chunk(self._engine, [(leaf, leaf.selected) for leaf in self._leaves])
        responses = iter(chunk.answer(self._engine))
        return {leaf.name: leaf.rival_answers(responses) for leaf in self._leaves}

    def put(self, answers: RivalAnswers) -> None:
        """Give each document its answer, as if its task's file had had it; the scorer's fingerprint covers them.

        Raises:
            TaskError: If a document has none.
        """
        for leaf in self._leaves:
            own = answers.get(leaf.name, {})
            for doc_id in leaf.selected:
                if str(doc_id) not in own:
                    raise TaskError(f"task '{leaf.name}', document {doc_id}: must have an answer to compare, got none")
                leaf.add_to_document(doc_id, own[str(doc_id)])
        self._leaves = []
