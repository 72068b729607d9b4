"""One term of the score: an eval task, group or tag, its metric and its weight.

Knows how the values of leaves become one figure, as lm-eval aggregates them. It does not render or answer anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.answers import N_TOKENS, summarize
from optuna_merge.evaluation.description import TaskDescription
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import Documents, Score, TaskScore


@dataclass(frozen=True)
class EvalTask:
    """What a study asks of one eval task.

    Attributes:
        name: A task, group or tag of lm-eval, or the path of a task's YAML file.
        weight: Multiplies the metric; negative to minimise it.
        metric: ``metric,filter`` as lm-eval reports it; the filter may be left out if only one has the metric. None:
            accuracy if the task has it, else its first metric of which more is better, else its first.
        metadata: Passed to lm-eval with the task, like its ``--metadata``.
    """

    name: str
    weight: float = 1.0
    metric: str | None = "acc,none"
    metadata: Mapping[str, Any] | None = None


@dataclass
class Term:
    """One eval task with the lm-eval tasks behind it.

    Attributes:
        task: What the study asks.
        kind: ``task``, ``group`` or ``tag``.
        leaves: The lm-eval tasks that it consists of.
        group: Says how leaves are aggregated; None: by their unweighted mean.
        key: Name of the term among all of them.
        metric: The metric that counts, ``metric,filter``.
        metrics: All metrics that it has.
    """

    task: EvalTask
    kind: str
    leaves: list[Leaf]
    group: Group | None
    key: str = ""
    metric: str = ""
    metrics: tuple[str, ...] = ()

    @property
    def weight(self) -> float:
        """What the metric is multiplied by."""
        return self.task.weight

    @property
    def is_mean(self) -> bool:
        """Whether the metric is a mean over documents."""
        return all(leaf.aggregation(self._metric_name) is mean for leaf in self.leaves)

    def resolve_metric(self) -> None:
        """Find the metric that is asked for, and have the leaves compute it.

        Raises:
            TaskError: If no metric or several ones match.
        """
        per_leaf = {leaf.name: leaf.metrics() for leaf in self.leaves}
        if self.group is not None:
            entries = {name: {"sample_len": 1, **dict.fromkeys(keys, 0.0)} for name, keys in per_leaf.items()}
            found = [key for key in self.group.aggregate(cast("Any", entries)) if "," in key and "_stderr," not in key]
            found += [",".join(N_TOKENS)] if all(leaf.counts_tokens for leaf in self.leaves) else []
        else:
            found = list(dict.fromkeys(key for keys in per_leaf.values() for key in keys))
        self.metrics = tuple(found)
        wanted = self.task.metric or self._usual_metric()
        matches = [key for key in found if key == wanted or key.rpartition(",")[0] == wanted]
        if len(matches) != 1:
            fault = "has no metric" if not matches else "has several filters for metric"
            raise TaskError(f"task '{self.task.name}' {fault} '{wanted}'; it has: {', '.join(found) or 'none'}")
        self.metric = matches[0]
        name, filter_name = self._metric_name, self._filter_name
        for leaf in self.leaves:
            if (name, filter_name) not in leaf.wanted and self.metric in per_leaf[leaf.name]:
                leaf.wanted.append((name, filter_name))

    def _usual_metric(self) -> str:
        better = [metric for metric in self.metrics if self._grows(metric)] or list(self.metrics)
        return EvalTask.metric if EvalTask.metric in better else next(iter(better), "")

    def _grows(self, metric: str) -> bool:
        """Whether a task says that more of the metric is better; a task that does not say means it."""
        name = metric.rpartition(",")[0]
        return not any((leaf.task.higher_is_better() or {}).get(name) is False for leaf in self.leaves)

    def value(self, documents: Documents) -> float | None:
        """The metric over some documents; None where none of them has it."""
        columns = self._columns(documents)
        values = {leaf.name: leaf.value(self._metric_name, columns[leaf.name]) for leaf in self._present(columns)}
        return self._combine(values, _sizes(columns))[0] if values else None

    def score(self, documents: Documents, bootstrap: bool) -> TaskScore:
        """The metric over some documents with its standard error.

        Args:
            documents: Values of the documents.
            bootstrap: Whether to estimate by bootstrap what has no formula.

        Raises:
            TaskError: If no document has the metric.
        """
        columns = self._columns(documents)
        if not columns:
            raise TaskError(f"task '{self.key}': no document has metric '{self.metric}'; name one that the task gives")
        metric, present, sizes = self._metric_name, self._present(columns), _sizes(columns)
        values = {leaf.name: leaf.value(metric, columns[leaf.name]) for leaf in present}
        errors = {leaf.name: leaf.stderr(metric, columns[leaf.name], bootstrap) for leaf in present}
        value, error = self._combine(values, sizes, errors)
        answers = summarize([documents.get(leaf.name, {}) for leaf in self.leaves], self._filter_name)
        return TaskScore(self.metric, value, error, sum(sizes.values()), self.weight, answers)

    def pairs(self, documents: Documents, others: Documents) -> dict[str, list[tuple[Any, Any] | None]]:
        """The metric of two models on the same documents.

        Returns:
            Leaf to both values of each of its documents; None for a document without the metric. A leaf without the
            metric is left out.
        """
        pairs: dict[str, list[tuple[Any, Any] | None]] = {}
        for leaf in self.leaves:
            columns = [scored.get(leaf.name, {}).get(self.metric, []) for scored in (documents, others)]
            column = [None if a is None or b is None else (a, b) for a, b in zip(*columns, strict=True)]
            if any(pair is not None for pair in column):
                pairs[leaf.name] = column
        return pairs

    def shares(self, documents: Documents, others: Documents) -> dict[str, np.ndarray]:
        """What each document contributes to weight x difference of two models, for a metric that is a mean.

        Returns:
            Leaf to the shares of its documents, float64, shape ``[n_documents]``; NaN for a document without the
            metric. All shares of all leaves sum to weight x difference.
        """
        pairs = self.pairs(documents, others)
        sizes = {name: sum(pair is not None for pair in column) for name, column in pairs.items()}
        coefficients = self.coefficients(sizes)
        shares = {}
        for name, column in pairs.items():
            differences = np.array([math.nan if pair is None else float(pair[0]) - float(pair[1]) for pair in column])
            shares[name] = self.weight * coefficients[name] / sizes[name] * differences
        return shares

    def coefficients(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """What the metric of each leaf counts for in the term's; it is linear in them.

        Args:
            sizes: Leaf to the documents that it has; leaves without any are left out.
        """
        return {name: self._combine({leaf: float(leaf == name) for leaf in sizes}, sizes)[0] for name in sizes}

    def describe(self) -> TaskDescription:
        """What was found for this term."""
        return TaskDescription(
            name=self.key,
            kind=self.kind,
            leaves=tuple(leaf.name for leaf in self.leaves),
            metric=self.metric,
            metrics=self.metrics,
            weight=self.weight,
            is_mean=self.is_mean,
            more_is_better=self._grows(self.metric),
            n_searched=sum(len(leaf.searched) for leaf in self.leaves),
            n_holdout=sum(len(leaf.holdout) for leaf in self.leaves),
        )

    @property
    def metric_and_filter(self) -> tuple[str, str]:
        """The parts of :attr:`metric`."""
        return self._metric_name, self._filter_name

    @property
    def _metric_name(self) -> str:
        return self.metric.rpartition(",")[0]

    @property
    def _filter_name(self) -> str:
        return self.metric.rpartition(",")[2]

    def _columns(self, documents: Documents) -> dict[str, list[Any]]:
        """Leaf to the values of its documents; documents without the metric, and leaves without any, are left out."""
        columns = {}
        for leaf in self.leaves:
            values = documents.get(leaf.name, {}).get(self.metric, [])
            if present := [value for value in values if value is not None]:
                columns[leaf.name] = present
        return columns

    def _present(self, columns: Mapping[str, Any]) -> list[Leaf]:
        return [leaf for leaf in self.leaves if leaf.name in columns]

    def _combine(
        self, values: Mapping[str, float], sizes: Mapping[str, int], errors: Mapping[str, float | None] | None = None
    ) -> tuple[float, float | None]:
        """The value of a term from those of its leaves, and its standard error if all of theirs are known.

        A group says how it is aggregated; a tag, a group that does not say, or ``n_tokens`` of any, is the unweighted
        mean of its tasks.
        """
        known = {name: e for name, e in (errors or {}).items() if e is not None}
        counts = all(leaf.is_count(self._metric_name, self._filter_name) for leaf in self.leaves)
        if self.group is not None and not counts:
            stderr_key = f"{self._metric_name}_stderr,{self._filter_name}"
            entries: dict[str, dict[str, Any]] = {
                name: {"sample_len": sizes[name], self.metric: value} for name, value in values.items()
            }
            for name, leaf_error in known.items():
                entries[name][stderr_key] = leaf_error
            result = cast("dict[str, Any]", self.group.aggregate(cast("Any", entries)))
            pooled = result.get(stderr_key)
            return float(result[self.metric]), float(pooled) if isinstance(pooled, float) and known else None
        n = len(values)
        error = math.sqrt(sum(e**2 for e in known.values())) / n if len(known) == n else None
        return sum(values.values()) / n, error


def leaves_of(terms: Sequence[Term]) -> list[Leaf]:
    """The leaves of some terms, each once, in order."""
    return list({leaf.name: leaf for term in terms for leaf in term.leaves}.values())


def aggregate(terms: Sequence[Term], documents: Documents, *, stderr: bool) -> Score:
    """The score of some documents.

    Args:
        terms: The terms of the score.
        documents: The documents' values.
        stderr: Whether to estimate by bootstrap the standard errors that have no formula.

    Raises:
        TaskError: If no document has the metric of a term.
    """
    with quietly():
        tasks = {term.key: term.score(documents, stderr) for term in terms}
    return Score(sum(task.weight * task.value for task in tasks.values()), tasks, documents)


def name_apart(terms: list[Term]) -> list[Term]:
    """Give each term its key: the task's name, with the metric where a task is named twice.

    Raises:
        TaskError: If a task is named twice with one metric.
    """
    names = [term.task.name for term in terms]
    for term in terms:
        term.key = term.task.name if names.count(term.task.name) == 1 else f"{term.task.name} ({term.task.metric})"
    keys = [term.key for term in terms]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise TaskError(f"tasks must be named once, got '{repeated[0]}' twice with one metric; add up the weights")
    return terms


def _sizes(columns: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    return {name: len(column) for name, column in columns.items()}
