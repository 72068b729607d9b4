"""The held-out documents: which they are, and what the weights that an engine holds score on them.

Knows nothing of chunks and trials: nobody but ``study/holdout.py`` asks for these documents.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.chunks import Chunk
from optuna_merge.evaluation.engine import Engine
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import HeldDocument, Score
from optuna_merge.evaluation.selection import hold_out
from optuna_merge.evaluation.term import Term, aggregate, leaves_of
from optuna_merge.evaluation.transcript import question, right_answer


class Holdout:
    """The held-out documents of some terms, made ready for one engine.

    Args:
        engine: Answers.
        terms: Those that hold documents out.
    """

    def __init__(self, engine: Engine, terms: Sequence[Term]) -> None:
        self._engine = engine
        self._terms = tuple(terms)
        self._chunk: Chunk | None = None

    def score(self, *, stderr: bool = False) -> Score:
        """Score the weights that the engine holds on all held-out documents in one call.

        Args:
            stderr: Also estimate standard errors that need a bootstrap (100 draws); means have theirs anyway.

        Returns:
            The score; its documents also have what was answered, in the column ``answer``.

        Raises:
            TaskError: If a task's own code raises.
            EngineError: If the engine holds no complete weights or cannot answer.
        """
        if self._chunk is None:
            self._chunk = Chunk(self._engine, [(leaf, leaf.holdout) for leaf in leaves_of(self._terms)])
        documents = self._chunk.values(self._chunk.answer(self._engine), keep_answers=True)
        return aggregate(self._terms, documents, stderr=stderr)

    def lengthen(self, max_gen_toks: int) -> None:
        """Let answers have up to this many tokens from now on; the scorer's fingerprint changes with it.

        Raises:
            TaskError: If no held-out document is answered by a text.
        """
        if not sum(leaf.lengthen(leaf.holdout, max_gen_toks) for leaf in leaves_of(self._terms)):
            raise TaskError(
                f"max_gen_toks must be for a task that generates, got {max_gen_toks} and none; leave it out"
            )
        self._chunk = None

    def documents(self) -> list[HeldDocument]:
        """The held-out documents, task by task, as a person reads them."""
        with quietly():
            return [
                HeldDocument(
                    leaf.name,
                    doc_id,
                    question(leaf.task, leaf.instances[doc_id]),
                    right_answer(leaf.task, leaf.instances[doc_id][0].doc),
                    {term.metric: term.weight for term in self._terms if any(leaf is x for x in term.leaves)},
                )
                for leaf in leaves_of(self._terms)
                for doc_id in leaf.holdout
            ]


def hold_out_share(terms: list[Term], share: float, seed: int) -> list[Term]:
    """Hold out a share of each task's documents, drawn by a seed."""
    for leaf in leaves_of(terms):
        leaf.searched, leaf.holdout = hold_out(leaf.name, leaf.selected, share, seed)
    return terms


def hold_out_tasks(terms: Sequence[Term], holdout_terms: Sequence[Term]) -> None:
    """Hold out all documents of some terms.

    Raises:
        TaskError: If a task is also among the searched ones.
    """
    searched = {leaf.name for leaf in leaves_of(terms)}
    if shared := [leaf.name for leaf in leaves_of(holdout_terms) if leaf.name in searched]:
        raise TaskError(f"holdout: task '{shared[0]}' is also searched; hold out a share of it or another task")
    for leaf in leaves_of(holdout_terms):
        leaf.searched, leaf.holdout = [], leaf.selected
