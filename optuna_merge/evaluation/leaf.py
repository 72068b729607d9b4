"""One lm-eval task with documents."""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr, stderr_for_metric
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engine import Response

FEWSHOT_SEED: int = DEFAULT_OTHER_SEED
"""Seeds the draw of few-shot examples: lm-eval's own default, so that its command line reproduces our prompts."""

BOOTSTRAP_DRAWS = 100


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
