"""One term of the objective: an eval task, group or tag, its metric and its weight."""

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
from optuna_merge.evaluation.leaf import BOOTSTRAP_DRAWS, _Leaf
from optuna_merge.evaluation.results import Documents, TaskDescription, TaskScore


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


def _leaves(goals: Sequence[_Goal]) -> list[_Leaf]:
    return list({leaf.name: leaf for goal in goals for leaf in goal.leaves}.values())
