"""The study file: YAML text to a frozen ``StudyConfig``, or every problem in it at once.

Knows what the keys mean and which values go together. Does not open a model, a task or a storage: what can only be
seen there is checked where it is opened. A mergekit-evolve file is a study file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from optuna_merge.errors import ConfigError, MethodError
from optuna_merge.methods import MergeMethod, find_method
from optuna_merge.recipe import Dtype

KNOWN_BENCHMARKS = tuple(
    """
    agieval ai2_arc aime anli arc arithmetic asdiv babi bbh bbq belebele bigbench blimp boolq ceval cmmlu cola
    commonsense_qa copa coqa crows_pairs drop eq_bench ethics fld global_mmlu glue gpqa gsm8k gsm_plus headqa
    hellaswag hendrycks humaneval ifeval kmmlu lambada leaderboard livebench logiqa math_word_problems mathqa
    mbpp mc_taco medmcqa medqa mgsm minerva_math mlqa mmlu mnli mrpc multirc musr mutual nq_open openbookqa
    paloma piqa prost pubmedqa qa4mre qasper qnli qqp race rte sciq sglue simpleqa social_iqa squad squadv2 sst2
    storycloze super_glue swag tinyArc tinyBenchmarks tinyGSM8k tinyHellaswag tinyMMLU tinyTruthfulQA
    tinyWinogrande toxigen triviaqa truthfulqa tydiqa webqs wikitext winogrande wmdp wnli wsc wsc273 xcopa xnli
    xquad xstorycloze xwinograd
    """.split()
)
"""Benchmarks whose own tasks are no objective: a merge searched on them has been fitted to the test."""

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


def load_study(path: Path | str, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study file.

    Args:
        path: A YAML file; relative paths in it are relative to its folder.
        overrides: Dotted key to value, such as ``{"study.n_trials": 20}``; they replace what the file says, and
            relative paths among them are relative to the file too.

    Raises:
        ConfigError: With one line for each problem of the file.
    """
    path = Path(path)
    data, problems, lines = _parse_yaml(path)
    for key, value in (overrides or {}).items():
        problems += _set(data, key.split("."), value)
        lines[key] = 0  # no line of the file says it
    problems += _unknown_spellings(data)
    config, wrong = _validate(data, path)
    problems += wrong
    if config is not None:
        problems += list(_contradictions(config))
    if problems or config is None:
        raise ConfigError([_locate(path, lines, problem) for problem in dict.fromkeys(problems)])
    return config


def _validate(data: dict[str, Any], path: Path) -> tuple[StudyConfig | None, list[str]]:
    """The config and the wrong values. Wrong optional values are left out, so that the rest can be checked too."""
    try:
        return StudyConfig.model_validate(_with_paths(data, path)), []
    except pydantic.ValidationError as exc:
        # A list with a wrong item is also "too short" to pydantic.
        errors = [
            error
            for error in exc.errors(include_url=False)
            if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
        ]
    for error in errors:
        _drop(data, _keys(error["loc"]))
    problems = [_describe(error) for error in errors]
    try:
        return StudyConfig.model_validate(_with_paths(data, path)), problems
    except pydantic.ValidationError:
        return None, problems


def _drop(data: Any, keys: list[int | str]) -> None:
    """Remove the deepest mapping key on the way to a wrong value."""
    owner: dict[Any, Any] | None = None
    last: int | str = ""
    for key in keys:
        if isinstance(data, dict):
            owner, last = data, key
        elif not (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            break
        data = data.get(key) if isinstance(data, dict) else data[key]
    if owner is not None:
        owner.pop(last, None)


def _parse_yaml(path: Path) -> tuple[dict[str, Any], list[str], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError as exc:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a study file"
        raise ConfigError(f"{path}: study file must exist; {hint}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: study file must be readable text, got {exc}; check the path") from exc
    except yaml.YAMLError as exc:
        reason = " ".join(str(exc).split())
        raise ConfigError(f"{path}: study file must be YAML, got {reason}; correct that line") from exc
    if not isinstance(data, dict):
        got = "nothing" if data is None else _short(data)
        raise ConfigError(f"{path}: study file must be a mapping of keys, got {got}; see studies/quickstart.yaml")
    lines: dict[str, int] = {}
    try:
        problems = [] if node is None else list(_walk(node, "", lines))
    except RecursionError as exc:
        raise ConfigError(f"{path}: study file must end, got an anchor within itself; write it out") from exc
    return data, problems, lines


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[str]:
    """Note the line of every key; yield the keys that occur twice, of which YAML would keep the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else str(key.value)
            if name in lines:
                yield f"{name} must be given once, got it again; remove one of the two"
            lines[name] = key.start_mark.line + 1
            yield from _walk(value, name, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = f"{prefix}[{index}]"
            lines[name] = value.start_mark.line + 1
            yield from _walk(value, name, lines)


def _set(data: dict[str, Any], keys: list[str], value: Any) -> list[str]:
    """Put an override in its place; the problem if the file has something else than a section there."""
    for depth, key in enumerate(keys[:-1], start=1):
        inner = data.get(key)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and key in ("sampler", "pruner", "prior"):  # their short form
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            rule, fix = _RULES["model_type"]
            return [f"{'.'.join(keys[:depth])} must be {rule}, got {_short(inner)}; {fix}"]
        data[key] = inner
        data = inner
    data[keys[-1]] = value
    return []


def _with_paths(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Leave out the keys without a value, and fill in what depends on where the file is."""
    folder = path.resolve().parent
    data = _without_nulls(data)
    result = {key: value for key, value in data.items() if key != "path"}
    study = data.get("study", {})
    if isinstance(study, dict) and not study.get("name"):
        result["study"] = study = {**study, "name": path.stem}
    name = study.get("name", path.stem) if isinstance(study, dict) else path.stem
    if isinstance(study, dict) and isinstance(study.get("storage"), str):
        result["study"] = {**study, "storage": absolute_storage(study["storage"], folder)}
    search = data.get("search")
    if isinstance(search, dict) and "warm_start" in search:
        result["search"] = {**search, "warm_start": _warm_start_path(search["warm_start"], folder)}
    storage = data.get("storage_path")
    storage = f"{name}_study" if storage is None else storage
    result["storage_path"] = folder / Path(storage).expanduser() if isinstance(storage, str | Path) else storage
    folders = data.get("task_search_path")
    folders = [] if folders is None else [folders] if isinstance(folders, str | Path) else folders
    if isinstance(folders, list | tuple):
        folders = [folder / Path(item).expanduser() if isinstance(item, str | Path) else item for item in folders]
    result["task_search_path"] = folders
    result["path"] = path
    return result


def _warm_start_path(value: Any, folder: Path) -> Any:
    """``search.warm_start`` with what it names, relative to the study file's folder, made absolute."""
    if isinstance(value, str):
        return folder / Path(value).expanduser()
    if not isinstance(value, dict):
        return value
    file, storage = value.get("file"), value.get("storage")
    result = dict(value)
    if isinstance(file, str):
        result["file"] = folder / Path(file).expanduser()
    if isinstance(storage, str):
        result["storage"] = absolute_storage(storage, folder)
    return result


def _without_nulls(value: Any) -> Any:
    """A key with nothing after it means its default, as if it were not there; a task's metadata are its own."""
    if isinstance(value, dict):
        return {
            key: item if key == "metadata" else _without_nulls(item) for key, item in value.items() if item is not None
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_RULES = {
    "missing": ("given", "add it"),
    "int_type": ("a whole number", "write it without quotes or fraction"),
    "int_from_float": ("a whole number", "write it without fraction"),
    "float_type": ("a number", "write it without quotes; YAML wants 1.0e-3 where others write 1e-3"),
    "bool_type": ("true or false", "write true or false"),
    "string_type": ("text", "put it in quotes"),
    "tuple_type": ("a list", "write [a, b] or one item a line after '- '"),
    "dict_type": ("a mapping of keys", "indent the keys below it"),
    "mapping_type": ("a mapping of keys", "indent the keys below it"),
    "model_type": ("a mapping of keys", "indent the keys below it"),
    "is_instance_of": ("a path", "put it in quotes"),
    "finite_number": ("finite", "give a finite number"),
    "too_short": ("a list with at least {min_length} item", "add one"),
    "string_too_short": ("a name", "fill it in"),
    "greater_than": ("greater than {gt}", "raise it"),
    "greater_than_equal": ("at least {ge}", "raise it"),
    "less_than": ("less than {lt}", "lower it"),
    "less_than_equal": ("at most {le}", "lower it"),
    "literal_error": ("{expected}", "choose one of them"),
}


def _describe(error: Any) -> str:
    """Our line for one of pydantic's errors."""
    location = _dotted(error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return f"{location} must be {context['error']}, got {_short(error['input'])}; correct it"
    if kind not in _RULES:
        return f"{location}: {error['msg']}, got {_short(error['input'])}; correct it"
    rule, fix = _RULES[kind]
    got = "nothing" if kind == "missing" else _short(error["input"])
    return f"{location} must be {rule.format(**context)}, got {got}; {fix}"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in _keys(location):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _keys(location: tuple[int | str, ...]) -> list[int | str]:
    """The keys in the file: without our own nesting of ``search`` and ``holdout``."""
    keys = [part for part in location if part not in ("ranges", "fraction")]
    return [key for index, key in enumerate(keys) if not (key == "tasks" and index == 1 and keys[0] == "holdout")]


def _unknown_spellings(data: dict[str, Any]) -> list[str]:
    """Remove the keys that no section has, each with a line that names the nearest."""
    problems: list[str] = []

    def check(section: Any, known: type[BaseModel], where: str) -> None:
        if not isinstance(section, dict):
            return
        names = [name for name in known.model_fields if name not in ("path", "ranges")]
        for key in [key for key in section if key not in names]:
            near = difflib.get_close_matches(str(key), names, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(names))}"
            problems.append(f"{where}{key} must be a known key, got {str(key)!r}; {fix}")
            del section[key]

    check(data, StudyConfig, "")
    sections: dict[str, type[BaseModel]] = {"genome": GenomeConfig, "study": StudyOptions, "engine": EngineConfig}
    for name, known in sections.items():
        check(data.get(name), known, f"{name}.")
    study, search = data.get("study"), data.get("search")
    if isinstance(study, dict):
        sampler = study.get("sampler")
        if isinstance(sampler, dict) and sampler.get("name", "cmaes") in ("cmaes", "random"):
            check(sampler, SamplerConfig, "study.sampler.")
        check(study.get("pruner"), PrunerConfig, "study.pruner.")
    if isinstance(search, dict):
        check(search.get("prior"), PriorConfig, "search.prior.")
        check(search.get("warm_start"), WarmStartConfig, "search.warm_start.")
        for key, value in search.items():
            if key not in _SEARCH_KEYS:
                check(value, Range, f"search.{key}.")
    holdout = data.get("holdout")
    if isinstance(holdout, dict):
        check(holdout, HoldoutConfig, "holdout.")
        holdout = holdout.get("tasks")
    for name, tasks in (("tasks", data.get("tasks")), ("holdout", holdout)):
        for index, task in enumerate(tasks) if isinstance(tasks, list) else ():
            check(task, TaskConfig, f"{name}[{index}].")
    return problems


def _contradictions(config: StudyConfig) -> Iterator[str]:
    """What each value allows but their combination does not."""
    genome = config.genome
    held_out = config.holdout.tasks if config.holdout else ()
    for field, values in (
        ("genome.models", genome.models),
        ("genome.filters", genome.filters),
        ("tasks", [task.name for task in config.tasks]),
        ("holdout", [task.name for task in held_out]),
    ):
        for index, value in enumerate(values):
            if value in values[:index]:
                yield f"{field}[{index}] must be different from the others, got {value!r} again; remove one"
    if "rest" in genome.filters:
        where = f"genome.filters[{genome.filters.index('rest')}]"
        yield f"{where} must be another part of a tensor name, got 'rest'; in parameter names it means what is left"
    yield from _task_problems(config)
    yield from _search_problems(config)
    yield from _goal_problems(config)
    sampler = config.study.sampler
    for option, given in (
        ("popsize", sampler.popsize),
        ("sigma0", sampler.sigma0),
        ("gp_every", sampler.gp_every),
    ):
        if given is not None and sampler.name != "cmaes":
            yield f"study.sampler.{option} must be absent for {sampler.name}, got {given}; remove it"
    warm_start = config.search.warm_start
    if warm_start is not None and sampler.name != "cmaes":
        yield f"search.warm_start must be absent for {sampler.name}, got {warm_start.label!r}; remove it or use cmaes"
    if warm_start is not None and config.random_init:
        yield f"search.warm_start must be absent for random_init, got {warm_start.label!r}; remove one of the two"
    try:
        method = config.method
    except MethodError as exc:
        hint = str(exc).partition("; ")[2]
        yield f"genome.merge_method must be a known merge method, got {genome.merge_method!r}; {hint}"
        return
    if method.base == "required" and genome.base_model is None:
        yield f"genome.base_model must be given for {method.name}, got nothing; name the model that all were tuned from"
    if method.base == "none" and genome.base_model is not None:
        yield f"genome.base_model must be absent for {method.name}, got {genome.base_model!r}; remove it"
    sources = (None, "base", "union", genome.base_model, *genome.models)
    if genome.tokenizer_source not in sources:
        yield (
            f"genome.tokenizer_source must be base, union or one of the models, got {genome.tokenizer_source!r};"
            " spell it as in genome.models"
        )
    has_base = genome.base_model is not None
    least, most = method.n_models_for(has_base)
    n_models = len(config.sources)
    if n_models < least or (most is not None and n_models > most):
        wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
        yield f"genome.models must name {wanted} models for {method.name}, got {n_models}; add or remove some"
    for switch, is_on in (("normalize", genome.normalize), ("rescale", genome.rescale)):
        if is_on is not None and switch not in dict(method.switches):
            yield f"genome.{switch} must be absent for {method.name}, got {is_on}; remove it"
    known = {parameter.name: parameter for parameter in method.parameters_for(has_base)}
    for name, interval in config.search.ranges.items():
        parameter = known.get(name)
        if parameter is None:
            near = difflib.get_close_matches(name, [*known, *_SEARCH_KEYS], n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([*known, *_SEARCH_KEYS])}"
            yield f"search.{name} must be a parameter of {method.name}, got {name!r}; {fix}"
            continue
        if not parameter.low <= interval.low <= interval.high <= parameter.high:
            yield (
                f"search.{name} must be in [{parameter.low:g}, {parameter.high:g}], got"
                f" [{interval.low:g}, {interval.high:g}]; {name} is the {parameter.meaning}"
            )
        if name == "weight" and interval.low < 0 and not genome.allow_negative_weights:
            fix = "raise it or set genome.allow_negative_weights: true"
            yield f"search.weight.low must be at least 0, got {interval.low:g}; {fix}"


def _search_problems(config: StudyConfig) -> Iterator[str]:
    """Options of another pruner or prior than the one that is named."""
    pruner, prior = config.study.pruner, config.search.prior
    for option in pruner.options:
        owners = [name for name, options in PRUNER_OPTIONS.items() if option in options]
        if pruner.name not in owners:
            yield (
                f"study.pruner.{option} must be absent for {pruner.name}, got {_short(pruner.options[option])};"
                f" it belongs to {' and '.join(owners)}"
            )
    if prior.name == "isotropic":
        for part in sorted(prior.model_fields_set - {"name"}):
            yield (
                f"search.prior.{part} must be absent for isotropic, got {_short(getattr(prior, part))};"
                " it belongs to structured"
            )


def _goal_problems(config: StudyConfig) -> Iterator[str]:
    study = config.study
    if study.goal == "sum":
        for index, task in enumerate(config.tasks):
            if task.objective:
                yield (
                    f"tasks[{index}].objective must be absent for one score, got {task.objective!r}; remove it or set"
                    " study.goal: pareto"
                )
        return
    if len(config.objectives) < 2:
        yield (
            f"tasks must make several objectives for study.goal pareto, got {config.objectives[0]!r} alone; name"
            " another objective for some or leave study.goal out"
        )
    if study.sampler.name == "cmaes" or study.sampler.name.rpartition(".")[2] == "CmaEsSampler":
        yield (
            f"study.sampler must search several objectives for study.goal pareto, got {study.sampler.name}, which"
            " searches one; use gp, nsga2, tpe or random"
        )
    if study.pruner.name != "none":
        yield (
            f"study.pruner must be none for study.goal pareto, got {study.pruner.name}: no single score says which"
            " trial is worse; remove it"
        )


def _task_problems(config: StudyConfig) -> Iterator[str]:
    if all(task.weight == 0 for task in config.tasks):
        yield "tasks must be a list with a weight other than 0, got only 0; give one a weight"
    if not config.allow_benchmark_tasks:
        for index, task in enumerate(config.tasks):
            if is_benchmark(task.name):
                yield (
                    f"tasks[{index}].name must be no known benchmark's own task, got {task.name!r}; a merge searched on"
                    " a benchmark has been fitted to it: use other documents, or set allow_benchmark_tasks: true"
                )
    searched = {task.name for task in config.tasks}
    for index, task in enumerate(config.holdout.tasks if config.holdout else ()):
        if task.name in searched:
            yield f"holdout[{index}].name must be none of tasks, got {task.name!r}; use a fraction instead"
    for index, folder in enumerate(config.task_search_path):
        if not folder.is_dir():
            yield f"task_search_path[{index}] must be a folder, got {folder}; paths are relative to the study file"


def absolute_storage(url: str, folder: Path) -> str:
    """A storage URL whose file, if it is a relative one, starts at a folder."""
    relative = re.fullmatch(r"(sqlite(?:\+\w+)?:///|journal://)(?!/|file:|:memory:)(.+)", url)
    return url if relative is None else f"{relative[1]}{folder.absolute() / Path(relative[2]).expanduser()}"


def is_benchmark(task: str) -> bool:
    """Whether an eval task's name is that of a known benchmark; ``..._train`` never is."""
    if task.endswith("_train"):
        return False
    return any(task == name or task.startswith((f"{name}_", f"{name}-")) for name in KNOWN_BENCHMARKS)


def _locate(path: Path, lines: dict[str, int], problem: str) -> str:
    """Put the file, and the line if the problem's key or a part of its path has one, before a problem."""
    key = re.split(r" must |: ", problem, maxsplit=1)[0]
    while key and key not in lines:
        key = re.sub(r"(\[\d+\]|\.?[^.\[\]]*)$", "", key) if re.search(r"[.\[]", key) else ""
    return f"{path}:{lines[key]}: {problem}" if lines.get(key) else f"{path}: {problem}"


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
