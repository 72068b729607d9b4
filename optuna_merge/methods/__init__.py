"""The merge methods: what each needs and which numbers it takes.

``METHODS`` is the whole list. To add a method, write its tensor function in a file of this folder and add a row
here. This file loads no torch, so that a study file can be checked without it; ``MergeMethod.load`` fetches the
tensor function from the file that the row names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optuna_merge.errors import MethodError

if TYPE_CHECKING:
    from optuna_merge.methods.function import MergeFunction

BaseUse = Literal["required", "optional", "none"]


@dataclass(frozen=True)
class MethodParameter:
    """A number that a method takes, and that a search may vary.

    Attributes:
        name: As in mergekit: ``weight``, ``density``, ``lambda`` ...
        meaning: One line for people.
        default: Its value where nothing else is said; None: 1 / number of models.
        low, high: The values that make sense, both included.
        search: The range that is searched when the study file names none, or None: it stays at ``default``
            unless the study file gives it a range.
        per_model: Whether each model has its own value.
    """

    name: str
    meaning: str
    default: float | None
    low: float
    high: float
    search: tuple[float, float] | None = None
    per_model: bool = True


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: its declaration, without its arithmetic.

    Attributes:
        name: As in mergekit.
        summary: One line for people.
        reference: Paper or source.
        function: ``module:name`` of the tensor function.
        parameters: The numbers it takes.
        base: Whether it needs a base model.
        n_models: Least and greatest number of models besides the base; None: no limit.
        switches: Options that are on or off, with their defaults, such as ``normalize``.
        is_random: Whether it draws masks, which ``Recipe.seed`` fixes.
    """

    name: str
    summary: str
    reference: str
    function: str
    parameters: tuple[MethodParameter, ...]
    base: BaseUse
    n_models: tuple[int, int | None] = (1, None)
    switches: tuple[tuple[str, bool], ...] = ()
    is_random: bool = False

    def load(self) -> MergeFunction:
        """Import the tensor function."""
        module, _, name = self.function.partition(":")
        function: MergeFunction = getattr(importlib.import_module(module), name)
        return function


WEIGHT = MethodParameter("weight", "coefficient of the model", None, float("-inf"), float("inf"), search=(0.0, 1.5))
LAMBDA = MethodParameter("lambda", "scale of the summed task vector", 1.0, 0.0, 4.0, per_model=False)
DENSITY = MethodParameter("density", "fraction of entries kept", 1.0, 0.0, 1.0, search=(0.1, 1.0))
GAMMA = MethodParameter("gamma", "fraction of largest entries dropped", 0.01, 0.0, 1.0)
DELLA_DENSITY = dataclasses.replace(DENSITY, search=(0.2, 0.8))  # density - epsilon must stay above 0
EPSILON = MethodParameter("epsilon", "how far the chance of being kept departs from density", 0.15, 0.0, 0.5)

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            name="linear",
            summary="weighted mean of the models",
            reference="Model soups, arXiv:2203.05482",
            function="optuna_merge.methods.linear:linear",
            parameters=(WEIGHT,),
            base="optional",
            switches=(("normalize", True),),
        ),
        MergeMethod(
            name="task_arithmetic",
            summary="base plus the weighted sum of the task vectors",
            reference="Task arithmetic, arXiv:2212.04089",
            function="optuna_merge.methods.task_arithmetic:task_arithmetic",
            parameters=(WEIGHT, LAMBDA),
            base="required",
            switches=(("normalize", False),),
        ),
        MergeMethod(
            name="ties",
            summary="trims task vectors to their largest entries and adds those of the elected sign",
            reference="TIES-Merging, arXiv:2306.01708",
            function="optuna_merge.methods.ties:ties",
            parameters=(WEIGHT, DENSITY, LAMBDA),
            base="required",
            switches=(("normalize", True), ("rescale", False)),
        ),
        MergeMethod(
            name="dare_linear",
            summary="drops entries of task vectors at random and adds the rest",
            reference="DARE, arXiv:2311.03099",
            function="optuna_merge.methods.dare:dare_linear",
            parameters=(WEIGHT, DENSITY, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", True)),
            is_random=True,
        ),
        MergeMethod(
            name="dare_ties",
            summary="drops entries of task vectors at random and adds those of the elected sign",
            reference="DARE, arXiv:2311.03099",
            function="optuna_merge.methods.dare:dare_ties",
            parameters=(WEIGHT, DENSITY, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", True)),
            is_random=True,
        ),
        MergeMethod(
            name="breadcrumbs",
            summary="drops the largest and smallest entries of task vectors and adds the rest",
            reference="Model Breadcrumbs, arXiv:2312.06795",
            function="optuna_merge.methods.breadcrumbs:breadcrumbs",
            parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", False)),
        ),
        MergeMethod(
            name="breadcrumbs_ties",
            summary="breadcrumbs that adds only entries of the elected sign",
            reference="Model Breadcrumbs, arXiv:2312.06795",
            function="optuna_merge.methods.breadcrumbs:breadcrumbs_ties",
            parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", False)),
        ),
        MergeMethod(
            name="della",
            summary="drops entries at random, small ones more often, and adds those of the elected sign",
            reference="DELLA-Merging, arXiv:2406.11617",
            function="optuna_merge.methods.della:della",
            parameters=(WEIGHT, DELLA_DENSITY, EPSILON, LAMBDA),
            base="required",
            switches=(("normalize", True), ("rescale", True)),
            is_random=True,
        ),
        MergeMethod(
            name="della_linear",
            summary="drops entries at random, small ones more often, and adds the rest",
            reference="DELLA-Merging, arXiv:2406.11617",
            function="optuna_merge.methods.della:della_linear",
            parameters=(WEIGHT, DELLA_DENSITY, EPSILON, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", True)),
            is_random=True,
        ),
    )
}


def find_method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        MethodError: If there is none; the message names the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.replace("-", "_"), METHODS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise MethodError(f"unknown merge method {name!r}{hint} (known: {', '.join(sorted(METHODS))})")
