"""Eval tasks: loaded once, rendered once, scored chunk by chunk for every trial.

Knows lm-eval's tasks, groups, metrics and filters, which documents are searched and which are held out, and how
document values become a score. It does not know how a model answers (``engine.py``), nor what a trial is.

    names -> lm-eval tasks -> documents -> requests -> chunks      once, in Scorer.build
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import get_sample_size

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.chunks import MIN_CHUNK_REQUESTS, _Batch, _chunks, _in_document_order, _joined
from optuna_merge.evaluation.engine import Engine
from optuna_merge.evaluation.leaf import _Leaf, _random
from optuna_merge.evaluation.loader import _Loader
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import ChunkResult, Description, Documents, Score
from optuna_merge.evaluation.term import EvalTask, _Goal, _leaves


class Scorer:
    """Eval tasks made ready for one engine.

    Made by :meth:`build`. Scoring draws no random number and keeps nothing of a trial.

    Attributes:
        n_chunks: Chunks that the searched documents are cut into.
        n_documents: Searched documents, over all tasks.
        not_means: Eval tasks whose metric is no mean over documents.
        has_holdout: Whether there are documents for :meth:`score_holdout`.
    """

    def __init__(
        self,
        engine: Engine,
        goals: Sequence[_Goal],
        holdout_goals: Sequence[_Goal],
        *,
        seed: int,
        n_chunks: int | None,
        min_chunk_requests: int,
        chat_template_reason: str,
        chat_template: bool,
    ) -> None:
        self._engine = engine
        self._goals = tuple(goals)
        self._holdout_goals = tuple(holdout_goals)
        self._chat_template = chat_template
        self._chat_template_reason = chat_template_reason
        leaves = _leaves(goals)
        self.n_documents = sum(len(leaf.searched) for leaf in leaves)
        self._chunks = _chunks(engine, goals, n_chunks, min_chunk_requests, seed)
        self.n_chunks = len(self._chunks)
        self._holdout: _Batch | None = None

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
    ) -> Scorer:
        """Load tasks, render and tokenize every request, cut the documents into chunks.

        Args:
            engine: Renders and tokenizes; one without weights will do for describing.
            tasks: The terms of the objective.
            task_search_path: Folders searched for task files before lm-eval's own, which cost some ten seconds.
            limit: Documents of each task, or their share if below 1, as in lm-eval.
            num_fewshot: Overrides the tasks' number of examples, except where a task sets 0, as in lm-eval.
            shuffle: Draw the ``limit`` documents at random instead of taking the first ones.
            apply_chat_template: None: if the tokenizer has one.
            fewshot_as_multiturn: With a chat template, whether examples are turns of their own.
            holdout: Share of each task's documents, in (0, 1), that the objective does not see, or other tasks
                whose documents (up to ``limit``) are the holdout.
            seed: Seeds shuffling, the split and the chunks, nothing else.
            n_chunks: None: at most 50, as many as still fill a forward pass and ``min_chunk_requests`` and cost at most
                a tenth more than all documents at once.
            min_chunk_requests: Requests that a chunk should have at least.
            allow_unsafe_code: Run tasks that execute what the model generates.

        Raises:
            TaskError: If a task, metric or document cannot be used; one line that names it.
            EngineError: If the engine cannot answer a request.
        """
        chat_template, reason = _choose_chat_template(engine, apply_chat_template)
        others = () if holdout is None or isinstance(holdout, float | int) else tuple(holdout)
        if isinstance(holdout, float | int) and not 0 < holdout < 1:
            raise TaskError(f"holdout must be in (0, 1), got {holdout}; give a share of the documents or tasks")
        if not tasks:
            raise TaskError("tasks must name at least one eval task, got none; add one")
        if limit is not None and limit <= 0:
            raise TaskError(f"limit must be above 0, got {limit}: no documents would be left; raise it or leave it out")
        loader = _Loader(task_search_path, allow_unsafe_code)
        with quietly(), _lm_eval_seeds():
            goals = _name_apart([loader.load(task) for task in tasks])
            holdout_goals = _name_apart([loader.load(task) for task in others])
            for leaf in _leaves([*goals, *holdout_goals]):
                leaf.set_fewshot(num_fewshot)
                leaf.build(
                    _selection(leaf, limit, shuffle, seed),
                    apply_chat_template=chat_template,
                    fewshot_as_multiturn=fewshot_as_multiturn,
                    chat_template=engine.apply_chat_template if chat_template else None,
                    tokenizer_name=engine.tokenizer_name if chat_template else "",
                )
            for goal in [*goals, *holdout_goals]:
                goal.resolve_metric()
        if isinstance(holdout, float | int):
            for leaf in _leaves(goals):
                leaf.split(holdout, seed)
            holdout_goals = goals
        else:
            _refuse_overlap(goals, holdout_goals)
            for leaf in _leaves(holdout_goals):
                leaf.searched, leaf.holdout = [], leaf.selected
        return cls(
            engine,
            goals,
            holdout_goals,
            seed=seed,
            n_chunks=n_chunks,
            min_chunk_requests=min_chunk_requests,
            chat_template=chat_template,
            chat_template_reason=reason,
        )

    @property
    def not_means(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(goal.key for goal in self._goals if not goal.is_mean)

    @property
    def has_holdout(self) -> bool:  # noqa: D102
        return bool(self._holdout_goals)

    def score_chunk(self, chunk: int) -> ChunkResult:
        """Score the weights that the engine holds on one chunk.

        Args:
            chunk: In [0, ``n_chunks``); the same documents for every trial.

        Raises:
            TaskError: If a task's own code raises; names the task and the document.
            EngineError: If the engine holds no complete weights or cannot answer.
        """
        documents = self._chunks[chunk].score(self._engine)
        with quietly():
            score = sum(goal.weight * value for goal in self._goals if (value := goal.value(documents)) is not None)
        return ChunkResult(chunk, score, documents)

    def score_all(self, *, stderr: bool = False) -> Score:
        """Score the weights that the engine holds on every searched document."""
        return self.total([self.score_chunk(chunk) for chunk in range(self.n_chunks)], stderr=stderr)

    def total(self, results: Sequence[ChunkResult], *, stderr: bool = False) -> Score:
        """Aggregate chunks of one trial.

        Over all chunks this is the figure of ``lm_eval.evaluate`` on the same documents. Over some of them it is
        an estimate of it; for :attr:`not_means` it is the metric of the documents scored so far.

        Args:
            results: Each chunk at most once, in any order.
            stderr: Also estimate standard errors that need a bootstrap (100 draws); those of means always come.

        Raises:
            TaskError: If a chunk is repeated, or no document has the metric of a task.
        """
        numbers = [result.chunk for result in results]
        if len(set(numbers)) != len(numbers):
            raise TaskError(f"chunk results must hold each chunk once, got {sorted(numbers)}; drop the repeated ones")
        documents = _in_document_order(_joined([result.documents for result in results]))
        return _aggregate(self._goals, documents, stderr=stderr)

    def score_holdout(self, *, stderr: bool = False) -> Score:
        """Score the weights that the engine holds on the holdout documents, at once.

        Args:
            stderr: As in :meth:`total`.

        Raises:
            TaskError: If there is no holdout, or a task's own code raises.
            EngineError: If the engine holds no complete weights or cannot answer.
        """
        if not self._holdout_goals:
            raise TaskError("holdout: there are no holdout documents; set holdout to a share or to tasks")
        if self._holdout is None:
            parts = [(leaf, leaf.holdout) for leaf in _leaves(self._holdout_goals)]
            self._holdout = _Batch(self._engine, parts)
        return _aggregate(self._holdout_goals, self._holdout.score(self._engine), stderr=stderr)

    def paired_difference(self, score: Score, other: Score) -> tuple[float, float]:
        """Difference of two values on the same documents, searched or holdout, and its standard error.

        Args:
            score: Of one model.
            other: Of another one, over the same documents.

        Returns:
            ``score.value - other.value``, and its standard error from the differences document by document; tasks
            count as independent. Infinite where a task has one document. Metrics that are no means are
            bootstrapped over documents (200 draws, seeded).

        Raises:
            TaskError: If the two were not scored on the same documents.
        """
        _refuse_unpaired(score.documents, other.documents)
        goals = self._goals if {goal.key for goal in self._goals} == set(score.tasks) else self._holdout_goals
        variance = sum(goal.weight**2 * goal.paired_variance(score.documents, other.documents) for goal in goals)
        return score.value - other.value, math.sqrt(variance)

    def describe(self) -> Description:
        """What was found and what one evaluation costs; needs no weights."""
        goals = {goal.key: goal for goal in [*self._goals, *self._holdout_goals]}
        prepared = [chunk.prepared for chunk in self._chunks]
        return Description(
            tasks=tuple(goal.describe() for goal in goals.values()),
            n_chunks=self.n_chunks,
            n_documents=self.n_documents,
            n_requests=sum(p.n_requests for p in prepared),
            n_tokens=sum(p.n_tokens for p in prepared),
            longest=max(p.longest for p in prepared),
            n_padded=max(p.n_padded for p in prepared),
            n_scored=max(p.n_scored for p in prepared),
            n_cached=max(p.n_cached for p in prepared),
            chat_template=self._chat_template,
            chat_template_reason=self._chat_template_reason,
        )

    def fingerprint(self) -> str:
        """Hex SHA-256 of everything about the tasks that decides a score.

        Covers the terms of the objective, every document with its rendered requests, how values are computed and
        aggregated, the order of documents, the chunks and the holdout. Paths and library versions are left out.
        """
        digest = hashlib.sha256()
        for part, goals in (("searched", self._goals), ("holdout", self._holdout_goals)):
            for goal in goals:
                _update(digest, [part, goal.key, goal.task.name, goal.weight, goal.metric, goal.kind])
                _update(digest, [[leaf.name, *leaf.definition()] for leaf in goal.leaves])
        for leaf in _leaves([*self._goals, *self._holdout_goals]):
            for doc_id in leaf.selected:
                instances = leaf.instances[doc_id]
                arguments = [[i.request_type, i.arguments, i.repeats] for i in instances]
                _update(digest, [leaf.name, doc_id, instances[0].doc, arguments])
            _update(digest, [leaf.name, leaf.searched, leaf.holdout])
        for chunk in self._chunks:
            _update(digest, [[leaf.name, doc_ids] for leaf, doc_ids in chunk.parts])
        return digest.hexdigest()


def _choose_chat_template(engine: Engine, wanted: bool | None) -> tuple[bool, str]:
    if wanted and not engine.has_chat_template:
        raise TaskError(
            "apply_chat_template must be false or left out, got true: the tokenizer has no chat template; remove it"
        )
    if wanted is not None:
        return wanted, "applied, as asked" if wanted else "not applied, as asked"
    if engine.has_chat_template:
        return True, "applied: the tokenizer has one"
    return False, "not applied: the tokenizer has none"


def _selection(leaf: _Leaf, limit: int | float | None, shuffle: bool, seed: int) -> list[int]:
    n = len(leaf.task.eval_docs)
    size = get_sample_size(leaf.task, limit)
    size = n if size is None else min(size, n)
    if size < 1:
        raise TaskError(f"task '{leaf.name}': no documents are left ({n} in its split, limit {limit}); raise limit")
    if not shuffle:
        return list(range(size))
    return sorted(_random(seed, "shuffle", leaf.name).sample(range(n), size))


def _aggregate(goals: Sequence[_Goal], documents: Documents, *, stderr: bool) -> Score:
    with quietly():
        tasks = {goal.key: goal.score(documents, stderr) for goal in goals}
    return Score(sum(task.weight * task.value for task in tasks.values()), tasks, documents)


def _name_apart(goals: list[_Goal]) -> list[_Goal]:
    names = [goal.task.name for goal in goals]
    for goal in goals:
        goal.key = goal.task.name if names.count(goal.task.name) == 1 else f"{goal.task.name} ({goal.task.metric})"
    keys = [goal.key for goal in goals]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise TaskError(f"tasks must be named once, got '{repeated[0]}' twice with one metric; add up the weights")
    return goals


def _refuse_overlap(goals: Sequence[_Goal], holdout_goals: Sequence[_Goal]) -> None:
    searched = {leaf.name for leaf in _leaves(goals)}
    if shared := [leaf.name for leaf in _leaves(holdout_goals) if leaf.name in searched]:
        raise TaskError(f"holdout: task '{shared[0]}' is also searched; hold out a share of it or another task")


def _refuse_unpaired(documents: Documents, others: Documents) -> None:
    ids = [{name: columns["doc_id"] for name, columns in d.items()} for d in (documents, others)]
    if ids[0] != ids[1]:
        raise TaskError("paired difference: both scores must be over the same documents; score both on the same split")


def _update(digest: Any, content: Any) -> None:
    digest.update(json.dumps(content, sort_keys=True, default=repr).encode())


@contextlib.contextmanager
def _lm_eval_seeds() -> Iterator[None]:
    """Give tasks that draw from the global generators what ``simple_evaluate`` gives them, and put these back."""
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
