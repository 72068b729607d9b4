"""The study file: YAML text to a frozen ``StudyConfig``, or every problem in it at once.

Knows what the keys mean and which values go together. Does not open a model, a task or a storage: what can only be
seen there is checked where it is opened. A mergekit-evolve file is a study file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from optuna_merge.methods import MergeMethod, find_method
from optuna_merge.recipe import Dtype

SAMPLERS = ("cmaes", "gp", "nsga2", "random", "tpe")

PARETO_SAMPLER = "tpe"
"""What draws the weights where several objectives are maximised and the study file names no sampler."""

PRUNER_OPTIONS = {
    "wilcoxon": ("p_threshold", "n_startup_steps"),
    "median": ("n_startup_trials", "n_warmup_steps"),
    "hyperband": ("min_resource", "reduction_factor"),
    "successive_halving": ("min_resource", "reduction_factor"),
    "none": (),
}
"""Pruner to the options that it has."""

_VLLM_RESOURCES = frozenset(
    """
    block_size distributed_executor_backend enforce_eager gpu_memory_utilization in_process kv_cache_memory_bytes
    max_model_len max_num_batched_tokens max_num_seqs tensor_parallel_size
    """.split()
)
"""Options of vLLM that are a matter of memory and speed."""

_SEARCH_KEYS = ("embed_group", "prior", "warm_start")
"""Keys of ``search`` that are no parameter of a method."""

_List = Strict(False)  # a YAML list is a Python list; the frozen config holds tuples


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Range(_Section):
    """The range of a searched method parameter; or, with ``low == high``, its constant.

    Attributes:
        low, high: Both included.
        start: Where the search begins; None: the method's default.
    """

    low: float
    high: float
    start: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | list | tuple | Mapping):
            raise ValueError("a number (constant), [low, high] or {low: ..., high: ..., start: ...}")
        if isinstance(value, int | float):
            return {"low": float(value), "high": float(value)}
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError("a list of two numbers, [low, high]")
            return {"low": value[0], "high": value[1]}
        return dict(value)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError("a range whose low is not above its high")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError("a range whose start lies inside it")
        return self

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to search."""
        return self.low == self.high


class GenomeConfig(_Section):
    """What is merged: the keys of mergekit-evolve's ``genome``.

    Attributes:
        models: References of the sources: folders (relative to the study file) or hub names, ``@revision`` allowed.
        merge_method: A name in ``optuna_merge.methods.METHODS``.
        base_model: Reference of the common ancestor.
        tokenizer_source: ``base``, ``union`` or one of the models, where vocabularies differ.
        layer_granularity: Layers in a layer group; 0: one group. Need not divide the depth.
        allow_negative_weights: Lets the default range of ``weight`` go below 0.
        normalize: Divide by the sum of weights; None: the method's default.
        rescale: Make up for the entries that a sparsifying method drops; None: the method's default.
        smooth: Interpolate the groups' values across depth instead of stepping.
        filters: Parts of tensor names; each gets parameters of its own, the remaining tensors too.
    """

    models: Annotated[tuple[str, ...], _List, Field(min_length=1)]
    merge_method: str
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = Field(0, ge=0)
    allow_negative_weights: bool = False
    normalize: bool | None = None
    rescale: bool | None = None
    smooth: bool = False
    filters: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _List] = ()


class TaskConfig(_Section):
    """One eval task, or group of them, in the objective.

    Attributes:
        name: As lm-eval knows it.
        weight: Its part in the objective, which is the sum of weight x metric; negative: minimise the metric.
        metric: ``metric,filter`` as in lm-eval's results.
        metadata: Handed to the task's own ``custom_dataset`` function.
        objective: With ``goal: pareto``: which objective it counts towards; empty: one of its own, called by its name.
    """

    name: str = Field(min_length=1)
    weight: float = 1.0
    metric: str = "acc,none"
    objective: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class SamplerConfig(_Section):
    """Which Optuna sampler draws the weights.

    Any other option of a sampler that is neither ``cmaes`` nor ``random`` may be given too.

    Attributes:
        name: ``cmaes``, ``gp``, ``tpe``, ``nsga2``, ``random``, or the import path of a sampler class.
        popsize: Of ``cmaes``: trials in a generation; None: 4 + floor(3 ln dimensions).
        sigma0: Of ``cmaes``: first step as a fraction of each range, the same for all; None: ``search.prior``.
        gp_every: Of ``cmaes``: of so many trials one is drawn by a Gaussian process; 0: none; None: of five.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str = "cmaes"
    popsize: int | None = Field(None, ge=3)
    sigma0: float | None = Field(None, gt=0, le=1)
    gp_every: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value not in SAMPLERS and "." not in value:
            raise ValueError(f"{', '.join(SAMPLERS)}, or the import path of a sampler class")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """What is given of the options that are the sampler's own."""
        return dict(self.model_extra or {})


class PrunerConfig(_Section):
    """Which Optuna pruner ends a trial before all documents are scored.

    The options are Optuna's own, and so are the defaults of ``median``, ``hyperband`` and ``successive_halving``.

    Attributes:
        name: ``wilcoxon``, ``median``, ``hyperband``, ``successive_halving`` or ``none``.
        p_threshold: Of ``wilcoxon``: a trial is stopped when it is worse than the best one at this level; 0.1.
        n_startup_steps: Of ``wilcoxon``: chunks that every trial is scored on; 4.
        n_startup_trials: Of ``median``: trials that are not pruned; 5.
        n_warmup_steps: Of ``median``: chunks after which the first comparison comes; 0.
        min_resource: Of ``hyperband`` and ``successive_halving``: chunks after which the first comparison comes; 1.
        reduction_factor: Of both: one of so many trials goes on; 3 for ``hyperband``, 4 for ``successive_halving``.
    """

    name: Literal["wilcoxon", "median", "hyperband", "successive_halving", "none"] = "wilcoxon"
    p_threshold: float | None = Field(None, gt=0, lt=1)
    n_startup_steps: int | None = Field(None, ge=0)
    n_startup_trials: int | None = Field(None, ge=0)
    n_warmup_steps: int | None = Field(None, ge=0)
    min_resource: int | None = Field(None, ge=1)
    reduction_factor: int | None = Field(None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """What is given of the named pruner's options."""
        return {name: value for name, value in self.model_dump(exclude={"name"}).items() if value is not None}


class StudyOptions(_Section):
    """The Optuna study.

    Attributes:
        name: Name in the storage; empty: the study file's name.
        n_trials: Trials in total, baselines included; a second run continues up to it.
        n_workers: Processes that will run it at the same time, on all machines; decides the population.
        seed: Decides every draw, split and mask of the study.
        sampler, pruner: By name, or with options.
        storage: Optuna storage URL; None: an SQLite file in ``storage_path``.
        timeout: Seconds after which no further trial begins.
        n_chunks: Into how many parts the documents of one evaluation are cut; None: by their number.
        goal: ``sum``: one score; ``pareto``: each objective of the tasks is maximised for itself.
    """

    name: str = ""
    n_trials: int = Field(100, ge=1)
    n_workers: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**32)
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    storage: str | None = None
    timeout: float | None = Field(None, gt=0)
    n_chunks: int | None = Field(None, ge=1)
    goal: Literal["sum", "pareto"] = "sum"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_goal(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("goal") != "pareto":
            return value
        return {"sampler": PARETO_SAMPLER, "pruner": "none", **value}

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value in (".", "..") or re.search(r"[/\\\0]", value):
            raise ValueError("a name that can be part of a file name")
        return value


class VLLMConfig(_Section):
    """Options of vLLM. Any other option of its ``LLM`` class may be given too.

    Attributes:
        gpu_memory_utilization: Part of a GPU's memory that vLLM takes; None: all but what merging needs.
        max_model_len: Tokens of a prompt and what it generates; None: as many as the study's tasks need.
        tensor_parallel_size: GPUs that share the model.
        max_num_batched_tokens: Tokens that are computed at once; None: 8192, on a CPU 2048.
        enforce_eager: No CUDA graphs; None: none unless a task generates.
        quantization: Of the weights while they are scored, such as ``fp8``; None: none.
        kv_cache_memory_bytes: Memory for prompts in flight; None: what is left, on a CPU 1 GiB.
        in_process: Run vLLM in this process instead of one of its own.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    max_model_len: int | None = Field(None, ge=1)
    tensor_parallel_size: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    enforce_eager: bool | None = None
    quantization: str | None = None
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    in_process: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is given."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    @property
    def deciding(self) -> dict[str, Any]:
        """What is given of the options that may change a score, and not only memory or speed."""
        return {name: value for name, value in sorted(self.options.items()) if name not in _VLLM_RESOURCES}


class EngineConfig(_Section):
    """What answers the eval tasks' requests.

    Attributes:
        backend: ``hf`` (transformers) or ``vllm``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        merge_device: Where tensors are merged; ``auto``: on ``device``.
        sources: Where the models to merge live: ``gpu``, ``host`` memory or ``disk``; ``auto``: the first that they
            fit into, or ``disk`` if they are merged on the CPU.
        dtype: Of the merged model while it is scored, and when exported; ``auto``: the base model's.
        batch_size: Sequences of the longest kind in one forward pass; ``auto``: by memory.
        trust_remote_code: Run Python code that a model folder brings along.
        vllm: Options of vLLM.
    """

    backend: Literal["hf", "vllm"] = "hf"
    device: str = "auto"
    merge_device: str = "auto"
    sources: Literal["auto", "gpu", "host", "disk"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    trust_remote_code: bool = False
    vllm: VLLMConfig = VLLMConfig()

    @field_validator("device", "merge_device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise ValueError("auto, cpu, cuda or cuda:<index>")
        return value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _batch_size(cls, value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError("auto or a whole number of at least 1")
        return value


class PriorConfig(_Section):
    """First standard deviations of the weights.

    ``structured``: the first step of CMA-ES is drawn from the sum of three parts, in units of weight: one common to
    all weights, one for each model, one for each single weight. ``isotropic``: independent, a sixth of each range.

    Attributes:
        name: ``structured`` or ``isotropic``.
        common: Of the part that all weights share.
        model: Of the part that the weights of one model share.
        weight: Of each weight's own part; not 0, which would leave directions that are never searched.
    """

    name: Literal["structured", "isotropic"] = "structured"
    common: float = Field(0.2, ge=0, le=10)
    model: float = Field(0.15, ge=0, le=10)
    weight: float = Field(0.12, ge=0.001, le=10)

    @model_validator(mode="before")
    @classmethod
    def _name_only(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class WarmStartConfig(_Section):
    """Another study, whose best trials say where the search begins.

    Attributes:
        file: Its study file; None: ``study`` and ``storage`` say which it is.
        study: Its name.
        storage: Its Optuna storage URL.
        n_best: Trials whose weighted mean is where the search begins.
    """

    file: Path | None = None
    study: str | None = Field(None, min_length=1)
    storage: str | None = Field(None, min_length=1)
    n_best: int = Field(5, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _file_only(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _check(self) -> WarmStartConfig:
        is_named = self.study is not None and self.storage is not None
        if (self.file is None) != is_named or (self.file is not None and (self.study or self.storage)):
            raise ValueError("a study file, or {study: NAME, storage: URL}")
        return self

    @property
    def label(self) -> str:
        """What it is called wherever it lies: the study file's name, or the study's."""
        return self.study or (self.file.name if self.file else "")


class SearchConfig(_Section):
    """What is searched.

    Attributes:
        ranges: Method parameter to its range or constant.
        embed_group: ``shared``: embeddings go with the first layer group, final norm and head with the last;
            ``own``: they are groups of their own.
        prior: First standard deviations of the weights.
        warm_start: Another study, from whose best trials the search begins; None: from the best uniform merge.
    """

    ranges: Mapping[str, Range] = Field(default_factory=dict)
    embed_group: Literal["shared", "own"] = "shared"
    prior: PriorConfig = PriorConfig()
    warm_start: WarmStartConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        own = {key: value[key] for key in _SEARCH_KEYS if key in value}
        return {**own, "ranges": {str(key): item for key, item in value.items() if key not in own}}


class HoldoutConfig(_Section):
    """What only the final report scores.

    Attributes:
        fraction: Of each task's documents, in (0, 1); None if ``tasks`` are given.
        tasks: Other eval tasks, all of whose documents are held out.
    """

    fraction: float | None = Field(None, gt=0, lt=1)
    tasks: Annotated[tuple[TaskConfig, ...], _List] = ()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {"tasks": value}
        if isinstance(value, bool) or not isinstance(value, int | float | Mapping):
            raise ValueError("a fraction between 0 and 1, or a list of tasks")
        return {"fraction": float(value)} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check(self) -> HoldoutConfig:
        if (self.fraction is None) == (not self.tasks):
            raise ValueError("either a fraction between 0 and 1 or a list of tasks")
        return self


class StudyConfig(_Section):
    """A study file, read and found possible.

    Attributes:
        path: The study file.
        limit: Documents for each task, or the fraction of them if below 1; None: all.
        num_fewshot: Examples in each prompt; None: as the task says.
        shuffle: Shuffle each task's documents (seeded) before ``limit``.
        random_init: Start at a random point instead of the best uniform merge.
        apply_chat_template: None: if the tokenizer has one.
        fewshot_as_multiturn: With a chat template, few-shot examples as turns of a conversation.
        storage_path: Folder for everything that the study writes.
        task_search_path: Folders with eval tasks of one's own.
        holdout: What only the final report scores; None: nothing is held out.
        allow_benchmark_tasks: Let a known benchmark's own task be the objective.
        allow_unsafe_code: Let tasks run code that the model generates.
    """

    path: Path
    genome: GenomeConfig
    tasks: Annotated[tuple[TaskConfig, ...], _List, Field(min_length=1)]
    limit: float | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool = True
    study: StudyOptions = StudyOptions()
    engine: EngineConfig = EngineConfig()
    search: SearchConfig = SearchConfig()
    storage_path: Path
    task_search_path: Annotated[tuple[Path, ...], _List] = ()
    holdout: HoldoutConfig | None = None
    allow_benchmark_tasks: bool = False
    allow_unsafe_code: bool = False

    @field_validator("limit")
    @classmethod
    def _limit(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("a whole number, or a fraction below 1")
        return value

    @property
    def question(self) -> str:
        """What the study answers: the comment in the study file's first line; empty if there is none."""
        try:
            first = self.path.read_text(encoding="utf-8").partition("\n")[0]
        except OSError:
            return ""
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    @property
    def method(self) -> MergeMethod:
        """The declaration of the merge method."""
        return find_method(self.genome.merge_method)

    @property
    def sources(self) -> tuple[str, ...]:
        """References of the models that get weights: a base among them has a task vector of zero and gets none."""
        if self.method.base != "required":
            return self.genome.models
        return tuple(model for model in self.genome.models if model != self.genome.base_model)

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is maximised, in the order of the tasks: ``score`` alone unless the goal is ``pareto``."""
        if self.study.goal == "sum":
            return ("score",)
        return tuple(dict.fromkeys(task.objective or task.name for task in self.tasks))

    @property
    def dtype(self) -> Dtype | None:
        """The dtype asked for; None: the base model's."""
        return None if self.engine.dtype == "auto" else self.engine.dtype
