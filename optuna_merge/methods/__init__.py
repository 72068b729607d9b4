"""The merge methods: what each one needs and which numbers it takes.

``METHODS`` lists them all. To add a method, write its tensor function in a file of this folder and add a row here.
This file does not load torch, so that a study file can be checked without it; ``MergeMethod.load`` imports the tensor
function from the file that the row names.
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

BaseUse = Literal["required", "optional", "unused", "none"]
"""``unused``: a base may be given for its configuration and tokenizer, but takes no part in the arithmetic."""


@dataclass(frozen=True)
class MethodParameter:
    """A number that a method takes and that a search may vary.

    Attributes:
        name: As in mergekit: ``weight``, ``density``, ``lambda`` ...
        meaning: One line for people.
        default: Default value; None means 1 / number of models.
        low, high: Smallest and largest valid value.
        search: Range to search if the study file gives none; None keeps ``default``.
        per_model: Whether each model has its own value.
        with_base: True if the parameter applies only with a base, False if only without one, None if always.
        is_smooth: Whether the merged tensor has a derivative by it that is exact while thresholds, masks, elected signs
            and the choice of models stay. The tensor function must then compute through ``elementwise.write`` and use
            the functions of ``optuna_merge.duals``, not those of ``math``, on it.
    """

    name: str
    meaning: str
    default: float | None
    low: float
    high: float
    search: tuple[float, float] | None = None
    per_model: bool = True
    with_base: bool | None = None
    is_smooth: bool = False


@dataclass(frozen=True)
class MergeMethod:
    """The declaration of a merge method, without its arithmetic.

    Attributes:
        name: As in mergekit; of a user's method, its import path.
        summary: One line for people.
        reference: The paper, or where the method comes from.
        function: ``module:name`` of the tensor function.
        parameters: The numbers that it takes.
        base: ``required``; ``optional``; ``unused``: one may be given, and has no influence; ``none``: one is refused.
        n_models: Smallest and largest number of models besides the base; None means no limit.
        n_models_with_base: The same if a base is given, where it differs.
        switches: Options that are on or off, such as ``normalize``, with their defaults.
        is_random: Whether it draws random masks, which ``Recipe.seed`` determines.
        in_mergekit: Whether mergekit has it, with this name and these parameters; if not, no mergekit file makes the
            same model.
        keeps: What it makes once of each matrix of the models and keeps for all merges: nothing, one float32 matrix
            from all models, or one for each of them.
        cost: Time of a merge in a search, relative to a linear merge of as many models, on one CPU core; what is made
            once is not in it. From docs/benchmarks.md, rounded; None: not measured on an idle machine.
    """

    name: str
    summary: str
    reference: str
    function: str
    parameters: tuple[MethodParameter, ...]
    base: BaseUse
    n_models: tuple[int, int | None] = (1, None)
    n_models_with_base: tuple[int, int | None] | None = None
    switches: tuple[tuple[str, bool], ...] = ()
    is_random: bool = False
    in_mergekit: bool = True
    keeps: Literal["nothing", "a matrix", "a matrix for each model"] = "nothing"
    cost: float | None = None

    def parameters_for(self, has_base: bool) -> tuple[MethodParameter, ...]:
        """The parameters that apply with, or without, a base."""
        return tuple(p for p in self.parameters if p.with_base is None or p.with_base == has_base)

    def n_models_for(self, has_base: bool) -> tuple[int, int | None]:
        """Smallest and largest number of models besides the base, with or without one."""
        return self.n_models_with_base or self.n_models if has_base else self.n_models

    def load(self) -> MergeFunction:
        """Import the tensor function."""
        module, _, name = self.function.partition(":")
        function: MergeFunction = getattr(importlib.import_module(module), name)
        return function


WEIGHT = MethodParameter(
    "weight", "coefficient of the model", None, float("-inf"), float("inf"), search=(0.0, 1.5), is_smooth=True
)
LAMBDA = MethodParameter("lambda", "scale of the summed task vector", 1.0, 0.0, 4.0, per_model=False, is_smooth=True)
DENSITY = MethodParameter("density", "fraction of entries kept", 1.0, 0.0, 1.0, search=(0.1, 1.0))
GAMMA = MethodParameter("gamma", "fraction of entries dropped as too large", 0.01, 0.0, 1.0)
DELLA_DENSITY = dataclasses.replace(DENSITY, search=(0.2, 0.8))  # density - epsilon must stay above 0
CHANGE = MethodParameter(
    "epsilon", "an entry counts as unchanged up to this change", 1e-5, 0.0, float("inf"), (0.0, 1e-3), per_model=False
)
MASK_LAMBDA = MethodParameter(
    "mask_lambda", "the larger, the fewer entries matter to the model", 0.4, 0.0, float("inf"), (0.2, 0.6)
)
K = MethodParameter(
    "k", "keeps entries that matter to at least this many models", 2.0, 0.0, float("inf"), per_model=False
)
SCALING = MethodParameter("r", "", None, 0.0, float("inf"), (0.0, 1.0), per_model=False, is_smooth=True)
EPSILON = MethodParameter("epsilon", "largest deviation of an entry's chance to be kept from density", 0.15, 0.0, 0.5)

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            name="linear",
            summary="weighted mean of the models",
            reference="Model soups, arXiv:2203.05482",
            function="optuna_merge.methods.linear:linear",
            parameters=(WEIGHT,),
            base="unused",
            switches=(("normalize", True),),
            cost=1.0,
        ),
        MergeMethod(
            name="task_arithmetic",
            summary="base plus the weighted sum of the task vectors",
            reference="Task arithmetic, arXiv:2212.04089",
            function="optuna_merge.methods.task_arithmetic:task_arithmetic",
            parameters=(WEIGHT, LAMBDA),
            base="required",
            switches=(("normalize", False),),
            cost=1.1,
        ),
        MergeMethod(
            name="ties",
            summary="trims task vectors to their largest entries and adds those of the elected sign",
            reference="TIES-Merging, arXiv:2306.01708",
            function="optuna_merge.methods.ties:ties",
            parameters=(WEIGHT, DENSITY, LAMBDA),
            base="required",
            switches=(("normalize", True), ("rescale", False)),
            cost=15.0,
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
            cost=5.0,
        ),
        MergeMethod(
            name="consensus_ta",
            summary="task arithmetic that adds only entries that matter to several models",
            reference="Consensus merging, arXiv:2405.07813",
            function="optuna_merge.methods.consensus:consensus_ta",
            parameters=(WEIGHT, MASK_LAMBDA, K, LAMBDA),
            base="required",
            n_models=(2, None),
            switches=(("normalize", False),),
            in_mergekit=False,
        ),
        MergeMethod(
            name="consensus_ties",
            summary="ties that adds only entries that matter to several models",
            reference="Consensus merging, arXiv:2405.07813",
            function="optuna_merge.methods.consensus:consensus_ties",
            parameters=(WEIGHT, dataclasses.replace(DENSITY, default=0.2), MASK_LAMBDA, K, LAMBDA),
            base="required",
            n_models=(2, None),
            switches=(("normalize", False), ("rescale", False)),
            in_mergekit=False,
        ),
        MergeMethod(
            name="breadcrumbs",
            summary="drops the largest and smallest entries of task vectors and adds the rest",
            reference="Model Breadcrumbs, arXiv:2312.06795",
            function="optuna_merge.methods.breadcrumbs:breadcrumbs",
            parameters=(WEIGHT, DENSITY, GAMMA, LAMBDA),
            base="required",
            switches=(("normalize", False), ("rescale", False)),
            cost=11.0,
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
            cost=17.0,
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
        MergeMethod(
            name="slerp",
            summary="a point on the arc between two models",
            reference="Shoemake, Animating rotation with quaternion curves, 1985",
            function="optuna_merge.methods.spherical:slerp",
            parameters=(
                dataclasses.replace(
                    WEIGHT, meaning="picks the two highest; their softmax is the position", with_base=False
                ),
                MethodParameter(
                    "t",
                    "position between the base (0) and the model (1)",
                    0.5,
                    0.0,
                    1.0,
                    (0.0, 1.0),
                    False,
                    with_base=True,
                    is_smooth=True,
                ),
            ),
            base="optional",
            n_models=(2, None),
            n_models_with_base=(1, 1),
        ),
        MergeMethod(
            name="nuslerp",
            summary="a point on the arc between two models or their task vectors",
            reference="mergekit, nuslerp",
            function="optuna_merge.methods.spherical:nuslerp",
            parameters=(WEIGHT,),
            base="optional",
            n_models=(2, 2),
        ),
        MergeMethod(
            name="multislerp",
            summary="the mean direction of the models or their task vectors, at their mean norm",
            reference="mergekit, multislerp; https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            function="optuna_merge.methods.spherical:multislerp",
            parameters=(WEIGHT,),
            base="optional",
            switches=(("normalize_weights", True),),
        ),
        MergeMethod(
            name="karcher",
            summary="the Karcher mean of the models' directions, at their mean norm",
            reference="arXiv:2603.04972",
            function="optuna_merge.methods.spherical:karcher",
            parameters=(
                MethodParameter("max_iter", "greatest number of steps", 10.0, 1.0, 1000.0, per_model=False),
                MethodParameter("tol", "stops after a shorter step than this", 1e-5, 0.0, 1.0, per_model=False),
            ),
            base="none",
        ),
        MergeMethod(
            name="sce",
            summary="selects where models differ most, weights models by their change, erases minority signs",
            reference="SCE, arXiv:2408.07990",
            function="optuna_merge.methods.sce:sce",
            parameters=(
                MethodParameter(
                    "select_topk",
                    "fraction of the varying elements selected",
                    1.0,
                    0.0,
                    1.0,
                    (0.1, 1.0),
                    per_model=False,
                ),
            ),
            base="required",
        ),
        MergeMethod(
            name="tsv_m",
            summary="adds the main directions of each model's change, made orthogonal to those of the others",
            reference="Task Singular Vectors, arXiv:2412.00081",
            function="optuna_merge.methods.spectral:tsv_m",
            parameters=(dataclasses.replace(WEIGHT, default=1.0), LAMBDA),
            base="required",
            in_mergekit=False,
            keeps="a matrix for each model",
        ),
        MergeMethod(
            name="iso_c",
            summary="adds all directions of the summed changes at equal length",
            reference="Iso-C, arXiv:2502.04959",
            function="optuna_merge.methods.spectral:iso_c",
            parameters=(dataclasses.replace(LAMBDA, meaning="scale of the merged change", search=(0.0, 2.0)),),
            base="required",
            in_mergekit=False,
            keeps="a matrix",
        ),
        MergeMethod(
            name="ram",
            summary="averages entries that several models change, adds those that one changes",
            reference="RAM, arXiv:2601.13572",
            function="optuna_merge.methods.ram:ram",
            parameters=(CHANGE,),
            base="required",
        ),
        MergeMethod(
            name="ramplus_tl",
            summary="ram that scales up what only one model changes, the more it shares",
            reference="RAM+, arXiv:2601.13572",
            function="optuna_merge.methods.ram:ramplus_tl",
            parameters=(
                CHANGE,
                dataclasses.replace(SCALING, name="r", meaning="strength of the scaling", default=0.1),
                dataclasses.replace(SCALING, name="alpha", meaning="bound of the ratio that scales", default=0.2),
            ),
            base="required",
        ),
        MergeMethod(
            name="nearswap",
            summary="moves the base towards a model, further where they are closer",
            reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
            function="optuna_merge.methods.nearswap:nearswap",
            parameters=(
                MethodParameter(
                    "t",
                    "distance up to which the model's value is taken",
                    1e-3,
                    0.0,
                    float("inf"),
                    (0.0, 0.01),
                    False,
                    is_smooth=True,
                ),
            ),
            base="required",
            n_models=(1, 1),
        ),
        MergeMethod(
            name="arcee_fusion",
            summary="takes only the important changes of a model",
            reference="mergekit, arcee_fusion",
            function="optuna_merge.methods.arcee_fusion:arcee_fusion",
            parameters=(),
            base="required",
            n_models=(1, 1),
        ),
        MergeMethod(
            name="model_stock",
            summary="a point between the base and the mean of the models, chosen by the angles between them",
            reference="Model Stock, arXiv:2403.19522",
            function="optuna_merge.methods.spherical:model_stock",
            parameters=(),
            base="required",
            n_models=(2, None),
        ),
    )
}


def find_method(name: str) -> MergeMethod:
    """Find the method of that name, or the declaration at an import path such as ``my_package.my_method``.

    Raises:
        MethodError: If there is none; the message suggests the closest name.
    """
    if name in METHODS:
        return METHODS[name]
    if "." in name:
        return _import_method(name)
    near = difflib.get_close_matches(name.replace("-", "_"), METHODS, n=1)
    known = f"known: {', '.join(sorted(METHODS))}"
    raise MethodError(f"unknown merge method {name!r}", f"did you mean {near[0]!r}? ({known})" if near else known)


def _import_method(path: str) -> MergeMethod:
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise MethodError(
            f"merge method {path!r} must be importable, got: {exc}", "is its folder on PYTHONPATH?"
        ) from exc
    if not isinstance(found, MergeMethod):
        raise MethodError(
            f"merge method {path!r} must be a MergeMethod, got {type(found).__name__}", "declare it as one"
        )
    return dataclasses.replace(found, name=path, in_mergekit=False)
