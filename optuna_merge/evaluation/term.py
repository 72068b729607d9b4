"""One term of the score: an eval task, group or tag, its metric and its weight.

Knows how the values of leaves become one figure, as lm-eval aggregates them. It does not render or answer anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.metrics import mean

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.description import TaskDescription
from optuna_merge.evaluation.leaf import BOOTSTRAP_DRAWS, Leaf
from optuna_merge.evaluation.results import Documents, TaskScore


@dataclass(frozen=True)
class EvalTask:
    """What a study asks of one eval task.

    Attributes:
        name: A task, group or tag of lm-eval, or the path of a task's YAML file.
        weight: Multiplies the metric; negative to minimise it.
        metric: ``metric,filter`` as lm-eval reports it; the filter may be left out if only one has the metric.
        metadata: Passed to lm-eval with the task, like its ``--metadata``.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"
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
        else:
            found = list(dict.fromkeys(key for keys in per_leaf.values() for key in keys))
        self.metrics = tuple(found)
        wanted = self.task.metric
        matches = [key for key in found if key == wanted or key.rpartition(",")[0] == wanted]
        if len(matches) != 1:
            fault = "has no metric" if not matches else "has several filters for metric"
            raise TaskError(f"task '{self.task.name}' {fault} '{wanted}'; it has: {', '.join(found) or 'none'}")
        self.metric = matches[0]
        name, filter_name = self._metric_name, self._filter_name
        for leaf in self.leaves:
            if (name, filter_name) not in leaf.wanted and self.metric in per_leaf[leaf.name]:
                leaf.wanted.append((name, filter_name))

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
        return TaskScore(self.metric, value, error, sum(sizes.values()), self.weight)

    def paired_variance(self, documents: Documents, others: Documents) -> float:
        """Variance of the difference of this term's metric between two models, on the same documents."""
        pairs = self._pairs(documents, others)
        if not self.is_mean:
            return self._bootstrapped_variance(pairs)
        sizes = _sizes(pairs)
        variance = 0.0
        for name, column in pairs.items():
            if len(column) < 2:
                return math.inf
            # the aggregate is linear in the leaves, so a leaf's coefficient is the aggregate of its unit vector
            coefficient, _ = self._combine({leaf: float(leaf == name) for leaf in pairs}, sizes)
            differences = [float(a) - float(b) for a, b in column]
            variance += coefficient**2 * float(np.var(differences, ddof=1)) / len(column)
        return variance

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
            n_searched=sum(len(leaf.searched) for leaf in self.leaves),
            n_holdout=sum(len(leaf.holdout) for leaf in self.leaves),
        )

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

        A group says how it is aggregated; a tag, or a group that does not say, is the unweighted mean of its tasks.
        """
        known = {name: e for name, e in (errors or {}).items() if e is not None}
        if self.group is not None:
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

    def _bootstrapped_variance(self, pairs: Mapping[str, Sequence[tuple[Any, Any]]]) -> float:
        if any(len(column) < 2 for column in pairs.values()):
            return math.inf
        rnd = random.Random(0)
        sizes = _sizes(pairs)
        leaves = {leaf.name: leaf for leaf in self.leaves}

        def aggregated(drawn: Mapping[str, Sequence[tuple[Any, Any]]], side: int) -> float:
            values = {
                name: leaves[name].value(self._metric_name, [pair[side] for pair in column])
                for name, column in drawn.items()
            }
            return self._combine(values, sizes)[0]

        differences = []
        for _ in range(2 * BOOTSTRAP_DRAWS):
            drawn = {name: rnd.choices(column, k=len(column)) for name, column in pairs.items()}
            differences.append(aggregated(drawn, 0) - aggregated(drawn, 1))
        return float(np.var(differences, ddof=1))

    def _pairs(self, documents: Documents, others: Documents) -> dict[str, list[tuple[Any, Any]]]:
        pairs = {}
        for leaf in self.leaves:
            both = zip(documents[leaf.name][self.metric], others[leaf.name][self.metric], strict=True)
            if present := [(a, b) for a, b in both if a is not None and b is not None]:
                pairs[leaf.name] = present
        return pairs


def leaves_of(terms: Sequence[Term]) -> list[Leaf]:
    """The leaves of some terms, each once, in order."""
    return list({leaf.name: leaf for term in terms for leaf in term.leaves}.values())


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
