"""Eval tasks: loaded once, rendered once, scored chunk by chunk for every trial.

Knows which documents are searched and which are held out, and how their values become a score. It does not know how a
model answers (``engine.py``), nor what a trial is.

    names -> terms -> leaves -> documents -> requests -> chunks    once, in Scorer.build
    chunk -> responses -> filters -> document values -> score      for every trial

Whatever lm-eval defines is computed by lm-eval's own code: prompts, few-shot examples, filters, document values,
aggregation, groups, standard errors. A full score therefore equals the figure of ``lm_eval.evaluate``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from optuna_merge.errors import EngineError, TaskError
from optuna_merge.evaluation.chunks import MIN_CHUNK_REQUESTS, Chunk, cut
from optuna_merge.evaluation.description import Description
from optuna_merge.evaluation.difference import Difference, compare
from optuna_merge.evaluation.engine import DifferentiableEngine, Engine, Sink
from optuna_merge.evaluation.expected import ExpectedChunk, has_stand_in
from optuna_merge.evaluation.holdout import Holdout, hold_out_share, hold_out_tasks
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.loader import Loader
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.rendering import choose_chat_template, rendering_options
from optuna_merge.evaluation.results import ChunkResult, Documents, Expectation, Score, join
from optuna_merge.evaluation.rivals import Rivals
from optuna_merge.evaluation.selection import select
from optuna_merge.evaluation.term import EvalTask, Term, aggregate, leaves_of, name_apart
from optuna_merge.evaluation.transcript import shared_question
from optuna_merge.internals.lm_eval import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from optuna_merge.judging.judge import Judge


class Scorer:
    """Eval tasks made ready for one engine.

    Made by :meth:`build`. Scoring draws no random number and keeps nothing of a trial.

    Attributes:
        n_chunks: Chunks that the searched documents are cut into.
        n_documents: Searched documents, over all tasks.
        not_means: Terms whose metric is no mean over documents.
        holdout: The documents that the search does not see; None if there are none.
        judge: Whom the tasks ask about answers; None if none of them does.
        rivals: Documents that lack the answer to compare with; nothing can be scored before they have it.
    """

    def __init__(
        self,
        engine: Engine,
        terms: Sequence[Term],
        holdout_terms: Sequence[Term],
        chunks: Sequence[Chunk],
        *,
        beginnings_cost: float,
        chat_template: bool,
        chat_template_reason: str,
        judge: Judge | None = None,
    ) -> None:
        self._engine = engine
        self._terms = tuple(terms)
        self._holdout_terms = tuple(holdout_terms)
        self._chunks = tuple(chunks)
        self._beginnings_cost = beginnings_cost
        self._chat_template = chat_template
        self._chat_template_reason = chat_template_reason
        self.holdout = Holdout(engine, holdout_terms) if holdout_terms else None
        self._expected: dict[int, ExpectedChunk] = {}
        self.judge = judge
        self.rivals = Rivals(engine, terms, holdout_terms)
        self.n_chunks = len(chunks)
        self.n_documents = sum(len(leaf.searched) for leaf in leaves_of(terms))
        self._without_gradient: tuple[str, ...] | None = None

    @classmethod
    def build(
        cls,
        engine: Engine,
        tasks: Sequence[EvalTask],
        *,
        task_search_path: Sequence[str | Path] = (),
        limit: int | float | None = None,
        num_fewshot: int | None = None,
        shuffle: bool = False,
        apply_chat_template: bool | None = None,
        fewshot_as_multiturn: bool = False,
        holdout: float | Sequence[EvalTask] | None = None,
        seed: int = 0,
        n_chunks: int | None = None,
        min_chunk_requests: int = MIN_CHUNK_REQUESTS,
        allow_unsafe_code: bool = False,
        judge: Judge | None = None,
    ) -> Scorer:
        """Load tasks, render and tokenize every request, cut the documents into chunks.

        Args:
            engine: Renders and tokenizes; to describe only, it needs no weights.
            tasks: The terms of the score.
            task_search_path: Folders searched for task files before lm-eval's own, which take some ten seconds.
            limit: Documents of each task, or their share if below 1, as in lm-eval.
            num_fewshot: Replaces the tasks' number of examples, except where a task sets 0, as in lm-eval.
            shuffle: Draw the ``limit`` documents at random instead of taking the first ones.
            apply_chat_template: Whether prompts go through the chat template; None: if the tokenizer has one.
            fewshot_as_multiturn: Whether the chat template shows each example as a turn of its own.
            holdout: Share of each task's documents, in (0, 1), that the search does not see; or other tasks, whose
                documents (up to ``limit``) are the holdout.
            seed: Seeds shuffling, the split and the chunks, and nothing else.
            n_chunks: None: as many as still fill a forward pass, have ``min_chunk_requests`` each and together cost at
                most a tenth more than all documents at once; at most 50.
            min_chunk_requests: Requests that a chunk should have at least.
            allow_unsafe_code: Run tasks that execute what the model generates.
            judge: Scores the answers of tasks that have a rubric.

        Raises:
            TaskError: If a task, metric or document cannot be used; one line that names it.
            EngineError: If the engine cannot answer a request.
        """
        _refuse_options(tasks, limit, holdout)
        uses_template, reason = choose_chat_template(engine, apply_chat_template)
        rendering = rendering_options(engine, uses_template, fewshot_as_multiturn)
        others = () if holdout is None or isinstance(holdout, float | int) else holdout
        loader = Loader(task_search_path, allow_unsafe_code)
        with quietly(), _lm_eval_seeds():
            terms = name_apart([loader.load(task) for task in tasks])
            holdout_terms = name_apart([loader.load(task) for task in others])
            for leaf in leaves_of([*terms, *holdout_terms]):
                leaf.set_fewshot(num_fewshot)
                _connect(leaf, judge)
                leaf.build(select(leaf.name, leaf.task, limit, shuffle=shuffle, seed=seed), **rendering)
            for term in [*terms, *holdout_terms]:
                term.resolve_metric()
        if isinstance(holdout, float | int):
            holdout_terms = hold_out_share(terms, holdout, seed)
        else:
            hold_out_tasks(terms, holdout_terms)
        leaves = leaves_of([*terms, *holdout_terms])
        beginnings_cost = _expect(engine, leaves)
        chunks = cut(engine, terms, n_chunks, min_chunk_requests, seed)
        return cls(
            engine,
            terms,
            holdout_terms,
            chunks,
            beginnings_cost=beginnings_cost,
            chat_template=uses_template,
            chat_template_reason=reason,
            judge=judge if any(leaf.rubrics for leaf in leaves) else None,
        )

    @property
    def not_means(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(term.key for term in self._terms if not term.is_mean)

    def score_chunk(self, chunk: int) -> ChunkResult:
        """Score the weights that the engine holds on one chunk.

        Args:
            chunk: In [0, ``n_chunks``); the same documents for every trial.

        Raises:
            TaskError: If a task's own code raises; names the task and the document.
            EngineError: If the engine holds no complete weights or cannot answer.
        """
        return self.answer_chunk(chunk)()

    def answer_chunk(self, chunk: int) -> Callable[[], ChunkResult]:
        """Have the engine answer one chunk.

        Returns:
            Scores the answers and needs no engine: it may run in another thread while the next chunk is answered, but
            not twice at a time.
        """
        responses = self._chunks[chunk].answer(self._engine)
        return lambda: self._result(chunk, self._chunks[chunk].values(responses))

    def n_documents_in(self, chunk: int) -> int:
        """Number of documents of a chunk."""
        return sum(len(doc_ids) for _, doc_ids in self._chunks[chunk].parts)

    def differentiate_chunk(self, chunk: int, sink: Sink, *, generate: bool) -> Expectation:
        """Differentiate the expected score of one chunk by the weights that the engine holds.

        Args:
            chunk: As in :meth:`score_chunk`.
            sink: Takes the gradients, of each tensor several times; see ``DifferentiableEngine.respond_with_gradient``.
            generate: Whether to generate texts where a metric needs them, so that the pass is also a score. The
                gradient needs none: it is that of the probability of the right text.

        Returns:
            The expected score, with what :meth:`score_chunk` returns up to rounding. Terms without a stand-in are in
            the score, not in the expected score.

        Raises:
            TaskError, EngineError: As :meth:`score_chunk`, and if the engine cannot differentiate.
        """
        expected = self._expected_chunk(chunk)
        log_likelihoods, documents = expected.differentiate(sink, generate=generate)
        tasks = expected.goal.tasks(log_likelihoods)
        value = expected.goal.value(log_likelihoods)
        return Expectation(value, tasks, None if documents is None else self._result(chunk, documents))

    def expected_score(self, chunk: int) -> float:
        """The expected score of one chunk by itself, which costs a third of :meth:`differentiate_chunk`.

        Args:
            chunk: As in :meth:`score_chunk`.

        Raises:
            TaskError, EngineError: As :meth:`differentiate_chunk`.
        """
        return self._expected_chunk(chunk).value()

    def _expected_chunk(self, chunk: int) -> ExpectedChunk:
        if chunk not in self._expected:
            if not self._differentiates:
                raise EngineError("engine: must differentiate, but this one does not; use engine.backend: transformers")
            self._expected[chunk] = ExpectedChunk(
                cast("DifferentiableEngine", self._engine),
                self._terms,
                self._chunks[chunk].parts,
                self._chunks[chunk].prepared,
                uses_chat_template=self._chat_template,
            )
        return self._expected[chunk]

    def score_all(self, *, stderr: bool = False) -> Score:
        """Score the weights that the engine holds on every searched document."""
        return self.total([self.score_chunk(chunk) for chunk in range(self.n_chunks)], stderr=stderr)

    def total(self, results: Sequence[ChunkResult], *, stderr: bool = False) -> Score:
        """Aggregate chunks of one trial.

        Over all chunks this is the figure of ``lm_eval.evaluate`` on the same documents. Over some of them it is
        an estimate of that figure; for :attr:`not_means` it is the metric of the documents scored so far.

        Args:
            results: Each chunk at most once, in any order.
            stderr: Also estimate standard errors that need a bootstrap (100 draws); means have theirs anyway.

        Raises:
            TaskError: If a chunk is repeated, or no document has the metric of a task.
        """
        numbers = [result.chunk for result in results]
        if len(set(numbers)) != len(numbers):
            raise TaskError(f"chunk results must hold each chunk once, got {sorted(numbers)}; drop the repeated ones")
        documents = join([result.documents for result in results])
        return aggregate(self._terms, documents, stderr=stderr)

    def paired_difference(self, score: Score, other: Score) -> Difference:
        """Difference of two values on the same documents, searched or holdout, paired by document.

        Args:
            score: The score of one model.
            other: The score of another one, on the same documents.

        Returns:
            ``score.value - other.value``, its standard error and its p-value; :func:`compare` says how both are
            computed. If the difference is not finite, its error is infinite and its p-value is 1.

        Raises:
            TaskError: If the two were not scored on the same documents.
        """
        _refuse_unpaired(score.documents, other.documents)
        terms = self._terms if {term.key for term in self._terms} == set(score.tasks) else self._holdout_terms
        value = score.value - other.value
        if not math.isfinite(value):
            return Difference(value, math.inf, 1.0)
        with quietly():
            return Difference(value, *compare(terms, score.documents, other.documents))

    def _result(self, chunk: int, documents: Documents) -> ChunkResult:
        with quietly():
            score = sum(term.weight * value for term in self._terms if (value := term.value(documents)) is not None)
        return ChunkResult(chunk, score, documents)

    def describe(self) -> Description:
        """Say what was found and what one evaluation costs; needs no weights."""
        terms = {term.key: term for term in [*self._terms, *self._holdout_terms]}
        prepared = [chunk.prepared for chunk in self._chunks]
        leaves = leaves_of(self._terms)
        with quietly():
            shared = {leaf.name: shared_question(leaf.task, leaf.instances.values()) for leaf in leaves}
        return Description(
            tasks=tuple(term.describe() for term in terms.values()),
            n_chunks=self.n_chunks,
            n_documents=self.n_documents,
            n_requests=sum(p.n_requests for p in prepared),
            n_tokens=sum(p.n_tokens for p in prepared),
            longest=max(p.longest for p in prepared),
            n_padded=max(p.n_padded for p in prepared),
            n_scored=max(p.n_scored for p in prepared),
            n_cached=max(p.n_cached for p in prepared),
            n_places=sum(p.n_places for p in prepared),
            choice_cost=self._beginnings_cost + sum(p.cost - p.text_cost for p in prepared),
            text_cost=sum(p.text_cost for p in prepared),
            n_judged=sum(leaf.n_judged(leaf.searched) for leaf in leaves),
            n_judged_first=self.rivals.n_judged,
            n_judged_holdout=sum(leaf.n_judged(leaf.holdout) for leaf in leaves_of(self._holdout_terms)),
            shared_questions={name: text for name, text in shared.items() if text},
            chat_template=self._chat_template,
            chat_template_reason=self._chat_template_reason,
        )

    def on(self, engine: Engine) -> Scorer:
        """The same documents in the same chunks, prepared for another engine with the same tokenizer."""
        beginnings_cost = _expect(engine, leaves_of([*self._terms, *self._holdout_terms]))
        return Scorer(
            engine,
            self._terms,
            self._holdout_terms,
            [Chunk(engine, chunk.parts) for chunk in self._chunks],
            beginnings_cost=beginnings_cost,
            chat_template=self._chat_template,
            chat_template_reason=self._chat_template_reason,
            judge=self.judge,
        )

    def has_gradient(self, *, by_another_engine: bool = False) -> bool:
        """Whether the expected score can be differentiated: the engine can, and some metric has a stand-in.

        Args:
            by_another_engine: Whether an engine that can takes the place of this one for it.

        Raises:
            TaskError: As :meth:`without_gradient`.
        """
        can = by_another_engine or self._differentiates
        return can and len(self.without_gradient()) < len({term.key for term in self._terms})

    @property
    def _differentiates(self) -> bool:
        return hasattr(self._engine, "respond_with_gradient")

    def without_gradient(self) -> tuple[str, ...]:
        """Names of the tasks whose metric has no differentiable stand-in, judged by some documents.

        Runs the tasks' own code on made-up answers.

        Raises:
            TaskError: If the code of a task's ``gradient_target`` raises.
        """
        if self._without_gradient is None:
            with quietly():
                found = {t.key: has_stand_in(t, self._engine.eot_text, self._chat_template) for t in self._terms}
            self._without_gradient = tuple(name for name, is_there in found.items() if not is_there)
        return self._without_gradient

    def fingerprint(self) -> str:
        """Hex SHA-256 of everything about the tasks that decides a score.

        Covers the terms of the score, every document with its rendered requests, how values are computed and
        aggregated, the order of documents, the chunks and the holdout. Paths and library versions are left out.
        """
        digest = hashlib.sha256()
        for part, terms in (("searched", self._terms), ("holdout", self._holdout_terms)):
            for term in terms:
                _update(digest, [part, term.key, term.task.name, term.weight, term.metric, term.kind])
                _update(digest, [[leaf.name, *leaf.definition()] for leaf in term.leaves])
        for leaf in leaves_of([*self._terms, *self._holdout_terms]):
            for doc_id in leaf.selected:
                instances = leaf.instances[doc_id]
                arguments = [[i.request_type, i.arguments, i.repeats] for i in instances]
                _update(digest, [leaf.name, doc_id, instances[0].doc, arguments])
            _update(digest, [leaf.name, leaf.searched, leaf.holdout])
        for chunk in self._chunks:
            _update(digest, [[leaf.name, doc_ids] for leaf, doc_ids in chunk.parts])
        return digest.hexdigest()


def _refuse_options(
    tasks: Sequence[EvalTask], limit: int | float | None, holdout: float | Sequence[EvalTask] | None
) -> None:
    if isinstance(holdout, float | int) and not 0 < holdout < 1:
        raise TaskError(f"holdout must be in (0, 1), got {holdout}; give a share of the documents or tasks")
    if not tasks:
        raise TaskError("tasks must name at least one eval task, got none; add one")
    if limit is not None and limit <= 0:
        raise TaskError(f"limit must be above 0, got {limit}: no documents would be left; raise it or leave it out")


def _expect(engine: Engine, leaves: Sequence[Leaf]) -> float:
    """Announce all requests to an engine; returns what their common beginnings cost it."""
    return engine.expect([one for leaf in leaves for instances in leaf.instances.values() for one in instances])


def _connect(leaf: Leaf, judge: Judge | None) -> None:
    for rubric in leaf.rubrics:
        if judge is None:
            raise TaskError(f"task '{leaf.name}' is judged: the study must name a judge; add the section judge to it")
        rubric.ask = judge.ask


@contextlib.contextmanager
def _lm_eval_seeds() -> Iterator[None]:
    """Seed the global generators as ``simple_evaluate`` does, for tasks that draw from them; then restore them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _refuse_unpaired(documents: Documents, others: Documents) -> None:
    ids = [{name: columns["doc_id"] for name, columns in d.items()} for d in (documents, others)]
    if ids[0] != ids[1]:
        raise TaskError("paired difference: both scores must be over the same documents; score both on the same split")


def _update(digest: Any, content: Any) -> None:
    digest.update(json.dumps(content, sort_keys=True, default=repr).encode())
