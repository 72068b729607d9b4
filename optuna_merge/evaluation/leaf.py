"""One lm-eval task that has documents: its requests, its metrics, and the values of its documents.

A group or a tag consists of leaves (``term.py``). A leaf does not know what its metrics count for.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.answers import N_TOKENS, measured, unread, unread_column
from optuna_merge.evaluation.engine import Response
from optuna_merge.evaluation.faults import fault
from optuna_merge.evaluation.rendering import render
from optuna_merge.evaluation.transcript import ANSWER, answers
from optuna_merge.evaluation.values import from_plain, to_plain
from optuna_merge.internals.lm_eval import (
    DEFAULT_OTHER_SEED,
    apply_filters,
    filter_fallbacks,
    filter_functions,
    filter_names,
    filtered_before,
    mean_stderr,
    runs_generated_code,
    stderr_for_metric,
)
from optuna_merge.judging.rubric import Pairwise, Rubric

FEWSHOT_SEED: int = DEFAULT_OTHER_SEED
"""Seeds the draw of few-shot examples: lm-eval's own default, so that its command line reproduces our prompts."""

BOOTSTRAP_DRAWS = 100

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Options by which a task bounds the length of its answers; lm-eval takes the first that is given."""

_MADE_UP: dict[str, Response] = {
    "loglikelihood": (-1.0, False),
    "loglikelihood_rolling": -1.0,
    "generate_until": "",
}


@dataclass
class Leaf:
    """One lm-eval task that has documents.

    Attributes:
        name: As lm-eval names the task.
        task: lm-eval's task.
        config: Its configuration when it was loaded, as JSON.
        selected: Documents that are used, in ascending order; all are searched or held out.
        searched: Documents that the search sees.
        holdout: Documents that are held out.
        instances: Document to its requests.
        wanted: Metric and filter of each value that is computed for a document.
        counts_tokens: Whether the metric ``n_tokens`` is ours: the task generates and has no metric of that name.
    """

    name: str
    task: Task
    config: str
    selected: list[int] = field(default_factory=list)
    searched: list[int] = field(default_factory=list)
    holdout: list[int] = field(default_factory=list)
    instances: dict[int, list[Instance]] = field(default_factory=dict)
    wanted: list[tuple[str, str]] = field(default_factory=list)
    counts_tokens: bool = False

    def set_fewshot(self, num_fewshot: int | None) -> None:
        """Set the number of few-shot examples as lm-eval's command line does; None: the task's own."""
        own = self.task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            self.task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            self.task.set_config(key="num_fewshot", value=0)
        self.task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def build(self, selected: list[int], **rendering: Any) -> None:
        """Render the requests of the selected documents, which are all to be searched for now."""
        self.selected = self.searched = selected
        self.instances = render(self.name, self.task, selected, **rendering)

    def lengthen(self, doc_ids: Sequence[int], max_gen_toks: int) -> int:
        """Let the answers to some documents have up to this many tokens.

        Returns:
            Number of requests that are answered by a text.
        """
        texts = [i for doc_id in doc_ids for i in self.instances[doc_id] if i.request_type == "generate_until"]
        for instance in texts:
            context, options = instance.arguments
            others = {key: value for key, value in options.items() if key not in _LIMITS}
            instance.arguments = (context, {**others, _LIMITS[0]: max_gen_toks})
        return len(texts)

    @property
    def rubrics(self) -> list[Rubric]:
        """By what a judge rates the task's answers; empty if none does."""
        return [function for function in filter_functions(self.task) if isinstance(function, Rubric)]

    @property
    def runs_elsewhere(self) -> bool:
        """Whether made-up answers must not be processed: a judge would be asked, or code be run."""
        return runs_generated_code(self.task) or bool(self.rubrics)

    def without_rival(self) -> list[Pairwise]:
        """The rubrics that compare answers with one that no document has; empty where the documents have it.

        Raises:
            TaskError: If some documents have it and others lack it.
        """
        found = []
        for rubric in (rubric for rubric in self.rubrics if isinstance(rubric, Pairwise)):
            missing = [doc_id for doc_id in self.selected if self.instances[doc_id][0].doc.get(rubric.rival) is None]
            if missing and len(missing) < len(self.selected):
                raise TaskError(
                    f"task '{self.name}', document {missing[0]}: must have the field '{rubric.rival}', which others"
                    " have, got none; add it, or take it from all of them"
                )
            found += [rubric] if missing else []
        return found

    def rival_answers(self, responses: Iterator[Response]) -> dict[str, dict[str, str]]:
        """Number of each document to the answers that its rubrics lack, by field, as a judge would see them.

        Args:
            responses: The responses to all requests of the selected documents; of several ones to a document, the
                first counts.

        Raises:
            TaskError: If a filter raises.
        """
        found: dict[str, dict[str, str]] = {str(doc_id): {} for doc_id in self.selected}
        instances = self._answered(self.selected, responses)
        for rubric in self.without_rival():
            try:
                given = filtered_before(self.task, instances, rubric)
            except Exception as exc:
                raise fault(self.name, None, "a filter", exc) from exc
            answers = iter(given)
            for doc_id in self.selected:
                first, *_ = [next(answers) for _ in self.instances[doc_id]]
                found[str(doc_id)][rubric.rival] = str(first[0])
        return found

    def add_to_document(self, doc_id: int, fields: Mapping[str, str]) -> None:
        """Add fields to a document, for the task's own code and the fingerprint."""
        for instance in self.instances[doc_id]:
            instance.doc = {**instance.doc, **fields}

    def n_judged(self, doc_ids: Sequence[int]) -> int:
        """Questions that a judge is asked about the answers to some documents, repeated ones included."""
        n_answers = sum(i.repeats or 1 for doc_id in doc_ids for i in self.instances[doc_id])
        return n_answers * sum(rubric.n_questions for rubric in self.rubrics)

    def metrics(self) -> tuple[str, ...]:
        """Metrics as lm-eval would report them, ``metric,filter``, and ``n_tokens,none`` if the task generates.

        A task's ``process_results`` may return other metrics than the task declares, and only a call tells which. So
        the first document is processed with made-up responses; where that is impossible, the declared ones count.
        """
        filters = self._filters()
        instances = self.instances[self.selected[0]]
        generates = any(instance.request_type == "generate_until" for instance in instances)
        names: Sequence[str] = list(self.task.aggregation())
        if not generates or not self.runs_elsewhere:
            responses = [_MADE_UP[i.request_type] for i in instances for _ in range(i.repeats or 1)]
            try:
                [values] = self._process([self.selected[0]], iter(responses), filters[0])
                names = list(values)
            except TaskError:
                # an empty text may be no answer to the task's code; a log-likelihood always is one
                if not generates:
                    raise
        found = [f"{name},{filter_name}" for name in names for filter_name in filters]
        self.counts_tokens = generates and ",".join(N_TOKENS) not in found
        return (*found, *([",".join(N_TOKENS)] if self.counts_tokens else []))

    def score(
        self, doc_ids: Sequence[int], responses: Iterator[Response], *, keep_answers: bool = False
    ) -> dict[str, list[Any]]:
        """Values of some documents: ``doc_id``, each wanted ``metric,filter``, and the columns of ``answers.py``.

        Args:
            doc_ids: The documents.
            responses: The responses to their requests.
            keep_answers: Add a column with what was answered, see ``transcript.py``.
        """
        columns: dict[str, list[Any]] = {"doc_id": list(doc_ids)}
        answered = list(responses)
        by_document = self._by_document(doc_ids, answered)
        columns |= measured(by_document)
        if keep_answers and self.wanted:
            metric = self.wanted[0][0]
            columns[ANSWER] = [
                answers(self.task, self.instances[doc_id], own, metric)
                for doc_id, own in zip(doc_ids, by_document, strict=True)
            ]
        for metric, filter_name in self.wanted:
            if self.is_count(metric, filter_name):
                columns[f"{metric},{filter_name}"] = columns.get(metric, [None] * len(doc_ids))
                continue
            values = self._process(doc_ids, iter(answered), filter_name)
            columns[f"{metric},{filter_name}"] = [to_plain(v.get(metric), self.name, metric) for v in values]
            if "n_tokens" in columns and (fallbacks := filter_fallbacks(self.task, filter_name)):
                filtered = [[i.filtered_resps[filter_name] for i in self.instances[doc_id]] for doc_id in doc_ids]
                columns[unread_column(filter_name)] = unread(filtered, fallbacks)
        return columns

    def is_count(self, metric: str, filter_name: str) -> bool:
        """Whether a metric is the number of tokens, which the task's own code does not know."""
        return self.counts_tokens and (metric, filter_name) == N_TOKENS

    def document_value(self, doc_id: int, responses: Sequence[Response], metric: str, filter_name: str) -> Any:
        """A metric of one document, if its requests are answered so; None if it has not that metric.

        Raises:
            TaskError: If the task's own code raises.
        """
        [values] = self._process([doc_id], iter(responses), filter_name)
        return values.get(metric)

    def aggregation(self, metric: str) -> Callable[[Sequence[Any]], float]:
        """How a metric's values become one number; the mean where the task does not say."""
        return cast("Callable[[Sequence[Any]], float]", self.task.aggregation().get(metric, mean))

    def value(self, metric: str, column: Sequence[Any]) -> float:
        """Aggregate a metric's values."""
        try:
            return float(self.aggregation(metric)([from_plain(v) for v in column]))
        except OverflowError:
            # a perplexity is exp of a mean, which overflows for a very bad merge
            return math.inf
        except Exception as exc:
            raise fault(self.name, None, f"the aggregation of {metric}", exc) from exc

    def stderr(self, metric: str, column: Sequence[Any], bootstrap: bool) -> float | None:
        """Standard error of :meth:`value`, as lm-eval estimates it; None where it has no estimate.

        Args:
            metric: Name of the metric.
            column: Its values.
            bootstrap: Whether to estimate by bootstrap what has no formula.
        """
        if len(column) < 2:
            return None
        aggregation = self.aggregation(metric)
        values = [from_plain(v) for v in column]
        if aggregation is mean:
            return float(mean_stderr(values))
        if not bootstrap or stderr_for_metric(aggregation, BOOTSTRAP_DRAWS) is None:
            return None
        # lm-eval's own bootstrap starts a process pool and prints; these are the same draws without either
        rnd = random.Random(0)
        draws = [aggregation(rnd.choices(values, k=len(values))) for _ in range(BOOTSTRAP_DRAWS)]
        return float(np.std(draws, ddof=1))

    def definition(self) -> list[Any]:
        """Everything that decides how responses become values, for the fingerprint."""
        config = self.task.config
        parts = [_code_text(getattr(config, name, None)) for name in ("process_results", "filter_list", "metric_list")]
        aggregations = {metric: _code_text(self.aggregation(metric)) for metric, _ in self.wanted}
        rubrics = [repr(rubric) for rubric in self.rubrics]
        return [self.task.OUTPUT_TYPE, self.wanted, parts, aggregations, *([rubrics] if rubrics else [])]

    def _filters(self) -> list[str]:
        names = filter_names(self.task)
        if not names:
            raise TaskError(f"task '{self.name}': filter_list must have a filter, got none; add one or leave it out")
        return names

    def _by_document(self, doc_ids: Sequence[int], responses: Sequence[Response]) -> list[list[Response]]:
        left = iter(responses)
        counts = [sum(i.repeats or 1 for i in self.instances[doc_id]) for doc_id in doc_ids]
        return [[next(left) for _ in range(count)] for count in counts]

    def _answered(self, doc_ids: Sequence[int], responses: Iterator[Response]) -> list[Instance]:
        instances = [instance for doc_id in doc_ids for instance in self.instances[doc_id]]
        for instance in instances:
            instance.resps = [_plain(next(responses)) for _ in range(instance.repeats or 1)]
            instance.filtered_resps = {}
        return instances

    def _process(self, doc_ids: Sequence[int], responses: Iterator[Response], filter_name: str) -> list[dict[str, Any]]:
        instances = self._answered(doc_ids, responses)
        try:
            apply_filters(self.task, instances)
        except Exception as exc:
            raise fault(self.name, None, "a filter", exc) from exc
        values = []
        for doc_id in doc_ids:
            results = [instance.filtered_resps[filter_name] for instance in self.instances[doc_id]]
            try:
                values.append(dict(self.task.process_results(self.instances[doc_id][0].doc, results)))
            except Exception as exc:
                raise fault(self.name, doc_id, "process_results", exc) from exc
        return values


def _code_text(thing: Any) -> str:
    """A function as the text of its code; anything else as its representation, taken apart where it has parts."""
    if isinstance(thing, list | tuple):
        return json.dumps([_code_text(part) for part in thing])
    if isinstance(thing, Mapping):
        return json.dumps({str(key): _code_text(part) for key, part in thing.items()}, sort_keys=True)
    if callable(thing):
        try:
            return inspect.getsource(thing)
        except (OSError, TypeError):
            return getattr(thing, "__qualname__", type(thing).__qualname__)
    return repr(thing)


def _plain(response: Response) -> Response:
    """A response as tasks and lm-eval expect it: they make more of a text's type, with nothing but a text."""
    return str(response) if isinstance(response, str) else response
