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
import difflib
import hashlib
import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr, stderr_for_metric
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engine import Engine, Prepared, Response
from optuna_merge.evaluation.quiet import quietly

FEWSHOT_SEED: int = DEFAULT_OTHER_SEED
"""Seeds the draw of few-shot examples: lm-eval's own default, so that its command line reproduces our prompts."""

MAX_CHUNKS = 50
MIN_CHUNK_REQUESTS = 8
MAX_CHUNK_COST = 1.1
"""What all chunks may cost together, over all documents at once: short ones are padded more and fill no batch."""

BOOTSTRAP_DRAWS = 100
Documents = dict[str, dict[str, list[Any]]]
"""Leaf task to ``doc_id`` and to each metric (``acc,none``): parallel lists of plain JSON values, in document order."""


@dataclass(frozen=True)
class EvalTask:
    """One term of the objective.

    Attributes:
        name: A task, group or tag of lm-eval, or the path of a task's YAML file.
        weight: Multiplies the metric as it stands; negative to minimise.
        metric: ``metric,filter`` as lm-eval reports it; the filter may be left out where only one has the metric.
        metadata: Passed to lm-eval with the task, as its ``--metadata``.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TaskScore:
    """What one eval task scored.

    Attributes:
        metric: ``metric,filter``.
        value: The metric as lm-eval aggregates it.
        stderr: Its standard error as lm-eval estimates it; None where it has no estimate or none was asked for.
        n_documents: Documents aggregated.
        weight: Its weight in the objective.
    """

    metric: str
    value: float
    stderr: float | None
    n_documents: int
    weight: float


@dataclass(frozen=True)
class Score:
    """The objective over some documents.

    Attributes:
        value: Sum of weight x metric over the eval tasks.
        tasks: Eval task to its score.
        documents: The document values behind it.
    """

    value: float
    tasks: dict[str, TaskScore]
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal score, floats included to the last bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Score:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no score.
        """
        try:
            data = json.loads(text)
            tasks = {name: TaskScore(**task) for name, task in data["tasks"].items()}
            return cls(data["value"], tasks, data["documents"])
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise TaskError(f"score: not readable ({exc!r}); it must be what Score.to_json wrote") from exc


@dataclass(frozen=True)
class ChunkResult:
    """What one trial scored on one chunk.

    Attributes:
        chunk: Number of the chunk, in [0, ``n_chunks``).
        score: Sum of weight x metric, each metric aggregated over this chunk's documents.
        documents: The document values behind it.
    """

    chunk: int
    score: float
    documents: Documents

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal result, floats included to the last bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ChunkResult:
        """Read what :meth:`to_json` wrote.

        Raises:
            TaskError: If the text is no result of a chunk.
        """
        try:
            data = json.loads(text)
            return cls(int(data["chunk"]), float(data["score"]), data["documents"])
        except (ValueError, KeyError, TypeError) as exc:
            raise TaskError(f"chunk result: not readable ({exc!r}); it must be what ChunkResult.to_json wrote") from exc


@dataclass(frozen=True)
class TaskDescription:
    """What was found for one eval task.

    Attributes:
        name: As in :attr:`Score.tasks`.
        kind: ``task``, ``group`` or ``tag``.
        leaves: The tasks that it consists of.
        metric: The metric that counts.
        metrics: All metrics that it has.
        weight: Its weight in the objective.
        is_mean: Whether the metric is a mean over documents; otherwise a partial score is the metric of the
            documents scored so far.
        n_searched: Documents that the objective sees.
        n_holdout: Documents that only the holdout sees.
    """

    name: str
    kind: str
    leaves: tuple[str, ...]
    metric: str
    metrics: tuple[str, ...]
    weight: float
    is_mean: bool
    n_searched: int
    n_holdout: int


@dataclass(frozen=True)
class Description:
    """What a scorer will do.

    Attributes:
        tasks: Every eval task, those of the holdout included.
        n_chunks: Chunks that the searched documents are cut into.
        n_documents: Searched documents.
        n_requests: Requests of one full evaluation.
        n_tokens: Tokens that one full evaluation puts through the model.
        longest: Tokens in the longest sequence.
        n_padded, n_scored, n_cached: What an engine holds of a call at most; see ``Prepared``.
        chat_template: Whether prompts go through the tokenizer's chat template.
        chat_template_reason: Why, in words.
    """

    tasks: tuple[TaskDescription, ...]
    n_chunks: int
    n_documents: int
    n_requests: int
    n_tokens: int
    longest: int
    n_padded: int
    n_scored: int
    n_cached: int
    chat_template: bool
    chat_template_reason: str


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


@dataclass
class _Leaf:
    """One lm-eval task that has documents."""

    name: str
    task: Task
    config: str
    selected: list[int] = field(default_factory=list)
    searched: list[int] = field(default_factory=list)
    holdout: list[int] = field(default_factory=list)
    instances: dict[int, list[Instance]] = field(default_factory=dict)
    wanted: list[tuple[str, str]] = field(default_factory=list)

    @property
    def filters(self) -> list[str]:
        return [ensemble.name for ensemble in getattr(self.task, "_filters", [])] or ["none"]

    def set_fewshot(self, num_fewshot: int | None) -> None:
        own = self.task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            self.task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            self.task.set_config(key="num_fewshot", value=0)
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def build(self, selected: list[int], **rendering: Any) -> None:
        # The few-shot random state moves from document to document, so the prompts of a subset are those of the
        # full run only if every document before it is rendered too.
        self.selected = self.searched = selected
        try:
            self.task.build_all_requests(limit=selected[-1] + 1, **rendering)
        except Exception as exc:
            self._refuse_too_many_examples(exc)
            doc_id = _local(exc.__traceback__, "build_all_requests", "doc_id")
            raise _raised(self.name, doc_id, "rendering its request", exc) from exc
        wanted = set(selected)
        self.instances = {}
        for instance in self.task.instances:
            if instance.doc_id in wanted:
                self.instances.setdefault(instance.doc_id, []).append(instance)
        for instances in self.instances.values():
            instances.sort(key=lambda instance: instance.idx)
        self.task._instances = None
        _remember_documents(self.task, [instances[0].doc for instances in self.instances.values()])

    def _refuse_too_many_examples(self, exc: Exception) -> None:
        sampler = _local(exc.__traceback__, "sample", "self", owner=ContextSampler)
        if sampler is None:
            return
        asked = _local(exc.__traceback__, "sample", "eval_doc", owner=ContextSampler)
        most = sum(document != asked for document in sampler.fewshot_docs())
        wanted = self.task.get_config("num_fewshot")
        if wanted > most:
            others = "" if asked is None else " besides the one that is asked"
            raise TaskError(
                f"task '{self.name}': num_fewshot must be at most {most}, the documents for examples{others}, got"
                f" {wanted}; lower it"
            ) from exc

    def split(self, share: float, seed: int) -> None:
        n = len(self.selected)
        n_holdout = max(1, round(share * n))
        if n_holdout >= n:
            raise TaskError(
                f"task '{self.name}': holdout {share} of {n} documents leaves none to search; "
                "lower holdout or raise limit"
            )
        drawn = set(_random(seed, "holdout", self.name).sample(self.selected, n_holdout))
        self.holdout = [doc_id for doc_id in self.selected if doc_id in drawn]
        self.searched = [doc_id for doc_id in self.selected if doc_id not in drawn]

    def metrics(self) -> tuple[str, ...]:
        """Metrics as lm-eval would report them: those of a first document with made-up responses, or declared ones.

        A task's ``process_results`` may return other metrics than the task declares; only calling it tells.
        """
        instances = self.instances[self.selected[0]]
        made_up = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}
        scored = all(instance.request_type != "generate_until" for instance in instances)
        names: Sequence[str] = list(self.task.aggregation())
        if scored or not getattr(self.task, "UNSAFE_CODE", False):
            responses = [made_up[i.request_type] for i in instances for _ in range(i.repeats or 1)]
            try:
                [values] = self._process([self.selected[0]], iter(cast("list[Response]", responses)), self.filters[0])
                names = list(values)
            except TaskError:
                # An empty text may be no answer at all to the task's code; a log-likelihood always is one.
                if scored:
                    raise
        return tuple(f"{name},{filter_name}" for name in names for filter_name in self.filters)

    def score(self, doc_ids: Sequence[int], responses: Iterator[Response]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"doc_id": list(doc_ids)}
        answered = list(responses)
        for metric, filter_name in self.wanted:
            values = self._process(doc_ids, iter(answered), filter_name)
            columns[f"{metric},{filter_name}"] = [_plain(v.get(metric), self.name, metric) for v in values]
        return columns

    def _process(self, doc_ids: Sequence[int], responses: Iterator[Response], filter_name: str) -> list[dict[str, Any]]:
        instances = [instance for doc_id in doc_ids for instance in self.instances[doc_id]]
        for instance in instances:
            instance.resps = [next(responses) for _ in range(instance.repeats or 1)]
            instance.filtered_resps = {}
        self.task._instances = instances
        try:
            self.task.apply_filters()
        except Exception as exc:
            raise _raised(self.name, None, "a filter", exc) from exc
        finally:
            self.task._instances = None
        values = []
        for doc_id in doc_ids:
            results = [instance.filtered_resps[filter_name] for instance in self.instances[doc_id]]
            try:
                values.append(dict(self.task.process_results(self.instances[doc_id][0].doc, results)))
            except Exception as exc:
                raise _raised(self.name, doc_id, "process_results", exc) from exc
        return values

    def aggregation(self, metric: str) -> Callable[[Sequence[Any]], float]:
        return cast("Callable[[Sequence[Any]], float]", self.task.aggregation().get(metric, mean))

    def value(self, metric: str, column: Sequence[Any]) -> float:
        try:
            return float(self.aggregation(metric)([_restored(v) for v in column]))
        except OverflowError:
            # exp of a perplexity's mean, for a merge that is very bad
            return math.inf
        except Exception as exc:
            raise _raised(self.name, None, f"the aggregation of {metric}", exc) from exc

    def stderr(self, metric: str, column: Sequence[Any], bootstrap: bool) -> float | None:
        if len(column) < 2:
            return None
        aggregation = self.aggregation(metric)
        if aggregation is mean:
            return float(mean_stderr([_restored(v) for v in column]))
        if not bootstrap or stderr_for_metric(aggregation, BOOTSTRAP_DRAWS) is None:
            return None
        # lm-eval's own bootstrap starts a process pool and prints; these are its draws without them
        rnd = random.Random(0)
        values = [_restored(v) for v in column]
        draws = [aggregation(rnd.choices(values, k=len(values))) for _ in range(BOOTSTRAP_DRAWS)]
        return float(np.std(draws, ddof=1))

    def definition(self) -> list[Any]:
        config = self.task.config
        sources = [_source(getattr(config, name, None)) for name in ("process_results", "filter_list", "metric_list")]
        aggregations = {metric: _source(self.aggregation(metric)) for metric, _ in self.wanted}
        return [self.task.OUTPUT_TYPE, self.wanted, sources, aggregations]


@dataclass
class _Goal:
    """One eval task with the lm-eval tasks behind it."""

    task: EvalTask
    kind: str
    leaves: list[_Leaf]
    group: Group | None
    key: str = ""
    metric: str = ""
    metrics: tuple[str, ...] = ()

    @property
    def weight(self) -> float:
        return self.task.weight

    @property
    def is_mean(self) -> bool:
        metric = self.metric.rpartition(",")[0]
        return all(leaf.aggregation(metric) is mean for leaf in self.leaves)

    def resolve_metric(self) -> None:
        per_leaf = {leaf.name: leaf.metrics() for leaf in self.leaves}
        if self.group is not None:
            entries = {name: {"sample_len": 1, **dict.fromkeys(keys, 0.0)} for name, keys in per_leaf.items()}
            found = [key for key in self.group.aggregate(cast("Any", entries)) if "," in key and "_stderr," not in key]
        else:
            found = list(dict.fromkeys(key for keys in per_leaf.values() for key in keys))
        self.metrics = tuple(found)
        wanted = self.task.metric
        matches = [key for key in found if key == wanted or key.rpartition(",")[0] == wanted]
        if len(matches) != 1:
            fault = "has no metric" if not matches else "has several filters for metric"
            raise TaskError(f"task '{self.task.name}' {fault} '{wanted}'; it has: {', '.join(found) or 'none'}")
        self.metric = matches[0]
        name, _, filter_name = self.metric.rpartition(",")
        for leaf in self.leaves:
            if (name, filter_name) not in leaf.wanted and self.metric in per_leaf[leaf.name]:
                leaf.wanted.append((name, filter_name))

    def columns(self, documents: Documents) -> dict[str, list[Any]]:
        """Leaf to the values of its documents; documents without this metric and leaves without any are left out."""
        columns = {}
        for leaf in self.leaves:
            values = documents.get(leaf.name, {}).get(self.metric, [])
            if present := [value for value in values if value is not None]:
                columns[leaf.name] = present
        return columns

    def value(self, documents: Documents) -> float | None:
        columns = self.columns(documents)
        metric = self.metric.rpartition(",")[0]
        values = {leaf.name: leaf.value(metric, columns[leaf.name]) for leaf in self.leaves if leaf.name in columns}
        return self._combine(values, {name: len(column) for name, column in columns.items()})[0] if values else None

    def score(self, documents: Documents, bootstrap: bool) -> TaskScore:
        columns = self.columns(documents)
        if not columns:
            raise TaskError(f"task '{self.key}': no document has metric '{self.metric}'; name one that the task gives")
        metric = self.metric.rpartition(",")[0]
        present = [leaf for leaf in self.leaves if leaf.name in columns]
        values = {leaf.name: leaf.value(metric, columns[leaf.name]) for leaf in present}
        errors = {leaf.name: leaf.stderr(metric, columns[leaf.name], bootstrap) for leaf in present}
        sizes = {name: len(column) for name, column in columns.items()}
        value, error = self._combine(values, sizes, errors)
        return TaskScore(self.metric, value, error, sum(sizes.values()), self.weight)

    def _combine(
        self, values: Mapping[str, float], sizes: Mapping[str, int], errors: Mapping[str, float | None] | None = None
    ) -> tuple[float, float | None]:
        """The value of a task from those of its leaves, and its standard error if all of theirs are known.

        A group is aggregated as it says; a tag, or a group without aggregation, is the unweighted mean of its tasks.
        """
        known = {name: e for name, e in (errors or {}).items() if e is not None}
        if self.group is not None:
            metric, _, filter_name = self.metric.rpartition(",")
            entries: dict[str, dict[str, Any]] = {
                name: {"sample_len": sizes[name], self.metric: value} for name, value in values.items()
            }
            for name, leaf_error in known.items():
                entries[name][f"{metric}_stderr,{filter_name}"] = leaf_error
            result = cast("dict[str, Any]", self.group.aggregate(cast("Any", entries)))
            pooled = result.get(f"{metric}_stderr,{filter_name}")
            return float(result[self.metric]), float(pooled) if isinstance(pooled, float) and known else None
        n = len(values)
        error = math.sqrt(sum(e**2 for e in known.values())) / n if len(known) == n else None
        return sum(values.values()) / n, error

    def paired_variance(self, documents: Documents, others: Documents) -> float:
        """Variance of the difference of this task's metric between two models."""
        if not self.is_mean:
            return self._bootstrapped_variance(documents, others)
        pairs = self._pairs(documents, others)
        sizes = {name: len(column) for name, column in pairs.items()}
        variance = 0.0
        for name, column in pairs.items():
            if len(column) < 2:
                return math.inf
            # the aggregate is linear in the leaves, so its coefficient is its value on a unit vector
            coefficient, _ = self._combine({leaf: float(leaf == name) for leaf in pairs}, sizes)
            differences = [float(a) - float(b) for a, b in column]
            variance += coefficient**2 * float(np.var(differences, ddof=1)) / len(column)
        return variance

    def _bootstrapped_variance(self, documents: Documents, others: Documents) -> float:
        pairs = self._pairs(documents, others)
        if any(len(column) < 2 for column in pairs.values()):
            return math.inf
        rnd = random.Random(0)
        sizes = {name: len(column) for name, column in pairs.items()}
        metric = self.metric.rpartition(",")[0]
        leaves = {leaf.name: leaf for leaf in self.leaves}
        differences = []
        for _ in range(2 * BOOTSTRAP_DRAWS):
            drawn = {name: rnd.choices(column, k=len(column)) for name, column in pairs.items()}
            sides = [
                self._combine({n: leaves[n].value(metric, [pair[k] for pair in c]) for n, c in drawn.items()}, sizes)[0]
                for k in (0, 1)
            ]
            differences.append(sides[0] - sides[1])
        return float(np.var(differences, ddof=1))

    def _pairs(self, documents: Documents, others: Documents) -> dict[str, list[tuple[Any, Any]]]:
        pairs = {}
        for leaf in self.leaves:
            both = zip(documents[leaf.name][self.metric], others[leaf.name][self.metric], strict=True)
            if present := [(a, b) for a, b in both if a is not None and b is not None]:
                pairs[leaf.name] = present
        return pairs

    def describe(self) -> TaskDescription:
        return TaskDescription(
            name=self.key,
            kind=self.kind,
            leaves=tuple(leaf.name for leaf in self.leaves),
            metric=self.metric,
            metrics=self.metrics,
            weight=self.weight,
            is_mean=self.is_mean,
            n_searched=sum(len(leaf.searched) for leaf in self.leaves),
            n_holdout=sum(len(leaf.holdout) for leaf in self.leaves),
        )


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


class _Loader:
    """Finds tasks by name: in the search path first, among lm-eval's own only if they are not there."""

    def __init__(self, search_path: Sequence[str | Path], allow_unsafe_code: bool) -> None:
        self._paths = [Path(path).expanduser() for path in search_path]
        for path in self._paths:
            if not path.is_dir():
                raise TaskError(f"task_search_path must name folders, got {path}, which is none; correct the path")
        self._allow_unsafe_code = allow_unsafe_code
        self._managers: dict[tuple[bool, str], TaskManager] = {}
        self._leaves: dict[str, _Leaf] = {}

    def load(self, task: EvalTask) -> _Goal:
        manager = self._manager_for(task)
        try:
            loaded = manager.load([task.name])
        except Exception as exc:
            built = _local(exc.__traceback__, "__init__", "self")
            if isinstance(exc, IndexError) and len(getattr(built, "task_docs", [None])) == 0:
                raise TaskError(f"task '{task.name}': no documents are left in its split; correct its data") from exc
            # lm-eval renders the first document when it loads a task
            doc_id = 0 if _local(exc.__traceback__, "__init__", "test_doc") is not None else None
            raise _raised(task.name, doc_id, "loading it", exc) from exc
        group = loaded.get("groups", {}).get(task.name)
        kind = "group" if group is not None else "task" if list(loaded["tasks"]) == [task.name] else "tag"
        if len(loaded["tasks"]) == 1 and kind == "tag" and task.name not in manager.all_tags:
            kind = "task"
        if not loaded["tasks"]:
            raise TaskError(f"task '{task.name}': the {kind} has no tasks in it; correct its file")
        leaves = [self._leaf(name, leaf) for name, leaf in loaded["tasks"].items()]
        return _Goal(task, kind, leaves, group if group is not None and group.has_aggregation else None)

    def _leaf(self, name: str, task: Task) -> _Leaf:
        if getattr(task, "UNSAFE_CODE", False) and not self._allow_unsafe_code:
            raise TaskError(
                f"task '{name}' runs code that the model generates; allow unsafe code for this study if you mean it"
            )
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"task '{name}' needs images or audio; only text can be scored")
        config = json.dumps(task.dump_config(), sort_keys=True, default=str)
        leaf = self._leaves.setdefault(name, _Leaf(name, task, config))
        if leaf.config != config:
            raise TaskError(f"task '{name}' is used twice with different settings; give one of them another name")
        return leaf

    def _manager_for(self, task: EvalTask) -> TaskManager:
        for include_defaults in (False, True):
            manager = self._manager(include_defaults, task.metadata)
            if task.name in manager.task_index or Path(task.name).expanduser().is_file():
                return manager
        raise TaskError(self._unknown(task.name, manager.all_tasks))

    def _manager(self, include_defaults: bool, metadata: Mapping[str, Any] | None) -> TaskManager:
        key = (include_defaults, json.dumps(metadata, sort_keys=True, default=str))
        if key not in self._managers:
            self._managers[key] = TaskManager(
                include_path=list(self._paths), include_defaults=include_defaults, metadata=dict(metadata or {})
            )
        return self._managers[key]

    def _unknown(self, name: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "name its folder in task_search_path"
        places = [*(str(path.resolve()) for path in self._paths), "lm-eval's own tasks"]
        message = f"unknown task '{name}'; {hint} (looked in {', '.join(places)})"
        # lm-eval skips files that it cannot read without a word
        for path in sorted(file for folder in self._paths for file in folder.glob("**/*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except Exception as exc:
                message += f"; {path} could not be read: {_first_line(exc)}"
        return message


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


def _leaves(goals: Sequence[_Goal]) -> list[_Leaf]:
    return list({leaf.name: leaf for goal in goals for leaf in goal.leaves}.values())


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


def _plain(value: Any, task: str, metric: str) -> Any:
    """A document's value as JSON can hold it; a tuple becomes ``{"tuple": [...]}``."""
    if value is None or isinstance(value, bool | int | float | str):
        # also turns numpy's float64, which is a float, into Python's
        return float(value) if isinstance(value, float) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, task, metric) for v in value]}
    if isinstance(value, list):
        return [_plain(v, task, metric) for v in value]
    if isinstance(value, Mapping):
        return {"dict": {str(k): _plain(v, task, metric) for k, v in value.items()}}
    raise TaskError(
        f"task '{task}': metric '{metric}' must be made of numbers and texts, got {type(value).__name__}; "
        "return something that JSON can hold"
    )


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(v) for v in value]
    if isinstance(value, dict):
        [(kind, content)] = value.items()
        if kind == "tuple":
            return tuple(_restored(v) for v in content)
        return {k: _restored(v) for k, v in content.items()}
    return value


def _remember_documents(task: Task, documents: Sequence[Any]) -> None:
    """Let a task render each document's target, text and choices once instead of once a trial.

    lm-eval compiles a template for every one of these calls, which costs more than a small model's forward pass.
    """
    if not isinstance(task, ConfigurableTask):
        return
    known = {id(document) for document in documents}
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        setattr(task, name, _remembering(getattr(task, name), known))


def _remembering(function: Callable[..., Any], known: set[int]) -> Callable[..., Any]:
    results: dict[int, Any] = {}

    def remembered(doc: Any, *args: Any) -> Any:
        if args or id(doc) not in known:
            return function(doc, *args)
        if id(doc) not in results:
            results[id(doc)] = function(doc)
        return results[id(doc)]

    return remembered


def _random(seed: int, purpose: str, name: str) -> random.Random:
    return random.Random(f"{seed}/{purpose}/{name}")


def _update(digest: Any, content: Any) -> None:
    digest.update(json.dumps(content, sort_keys=True, default=repr).encode())


def _source(thing: Any) -> str:
    if isinstance(thing, list | tuple):
        return json.dumps([_source(part) for part in thing])
    if isinstance(thing, Mapping):
        return json.dumps({str(key): _source(part) for key, part in thing.items()}, sort_keys=True)
    if callable(thing):
        try:
            return inspect.getsource(thing)
        except (OSError, TypeError):
            return getattr(thing, "__qualname__", type(thing).__qualname__)
    return repr(thing)


def _raised(task: str, doc_id: int | None, what: str, exc: Exception) -> TaskError:
    if isinstance(exc, TaskError):
        return exc
    place = f"task '{task}'" if doc_id is None else f"task '{task}', document {doc_id}"
    kind = type(exc).__name__
    return TaskError(f"{place}: {what} raised {kind}: {_first_line(exc)}; correct the task's file or data")


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or ["no message"])[0]


def _local(traceback: TracebackType | None, function: str, name: str, owner: type | None = None) -> Any:
    """The value of a local variable in the innermost frame of a function, or method, that an error passed through."""
    value = None
    while traceback is not None:
        frame = traceback.tb_frame
        is_its = owner is None or isinstance(frame.f_locals.get("self"), owner)
        if frame.f_code.co_name == function and name in frame.f_locals and is_its:
            value = frame.f_locals[name]
        traceback = traceback.tb_next
    return value


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
