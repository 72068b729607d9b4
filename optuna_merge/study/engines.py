"""Builds what a study file asks for: engine, loader, memory plan and scorer.

Knows the study file and its open checkpoints; knows nothing of trials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.tasks import TaskConfig
from optuna_merge.errors import EngineError
from optuna_merge.evaluation.description import Description
from optuna_merge.evaluation.engine import Engine, MakingEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.worker import FACTORY, describe_merger
from optuna_merge.study.judges import make_judge
from optuna_merge.study.kept import matrices_folder
from optuna_merge.study.loaders import LocalLoader, RecipeLoader, WorkerLoader
from optuna_merge.study.memory import CPU_KV_CACHE_BYTES, MemoryPlan, gib, plan_hf, plan_vllm
from optuna_merge.study.models import StudyModels
from optuna_merge.study.start import settle_start

if TYPE_CHECKING:
    from optuna_merge.evaluation.engines.hf import HFEngine

_ON_A_GPU = re.compile("fp4|fp8")
"""Quantizations that vLLM's CPU build lists and cannot compute."""


def make_loader(config: StudyConfig, models: StudyModels) -> tuple[RecipeLoader, Scorer]:
    """Build the engine of a study, the loader that merges into it, and the eval tasks prepared for it.

    Raises:
        EngineError: If the engine or a device is missing, or the models do not fit.
        TaskError: If an eval task cannot be used.
    """
    if config.engine.backend == "vllm":
        workers = _make_vllm_engine(config, models)
        return WorkerLoader(workers), build_scorer(config, workers)
    engine = make_engine(config, models)
    device = merge_device(config, engine.device)
    _require_device(device)
    scorer = build_scorer(config, engine)
    plan = plan_memory(settle_start(config, scorer)[0], models, engine, tasks=scorer.describe())
    merger = Merger(
        models.views,
        device=device,
        tokenizer_source=models.refs.tokenizer_source,
        placement=models.plan_placement(config, device, plan).placement,
        keep_in=matrices_folder(config),
    )
    return LocalLoader(merger, engine), scorer


def make_engine(config: StudyConfig, models: StudyModels) -> Engine:
    """The transformers engine of a study, without weights yet."""
    from optuna_merge.evaluation.engines.hf import HFEngine

    size = config.engine.batch_size
    with models.described() as folder:
        return HFEngine(
            folder,
            dtype=models.refs.dtype,
            device=config.engine.device,
            batch_tokens="auto" if size == "auto" else make_describing_engine(config, models).batch_tokens,
            names=models.names,
            trust_remote_code=config.engine.trust_remote_code,
        )


def make_describing_engine(config: StudyConfig, models: StudyModels, card: int | None = None) -> Engine:
    """An engine without weights that renders, tokenizes and batches requests as the study's engine does.

    Args:
        config: The study file.
        models: Its checkpoints.
        card: Memory of the GPU; see :func:`plan_memory`.
    """
    if config.engine.backend == "vllm":
        return _vllm_engine(config, models)
    from optuna_merge.evaluation.engines.hf import HFEngine

    size = config.engine.batch_size
    with models.described() as folder:
        engine = HFEngine.tokenizer_only(
            folder,
            dtype=models.refs.dtype,
            trust_remote_code=config.engine.trust_remote_code,
            card=_card(config, card),
        )
    if size != "auto":
        engine.batch_tokens = size * build_scorer(config, engine).describe().longest
    return engine


def plan_memory(
    config: StudyConfig,
    models: StudyModels,
    engine: Engine,
    card: int | None = None,
    tasks: Description | None = None,
) -> MemoryPlan:
    """How a study would fill the memory of its GPU.

    Args:
        config: The study file, with ``search.start`` settled.
        models: Its checkpoints.
        engine: Its engine, with or without weights.
        card: Bytes of the GPU's memory; 0: no GPU. Default: those of the GPU that the study would run on.
        tasks: What is scored. Required for transformers; vLLM plans the memory of its forward passes itself.
    """
    card = _card(config, card)
    shapes = {name: models.template.shape(name) for name in models.names}
    itemsize = getattr(torch, models.refs.dtype).itemsize
    n_models, model_config = len(models.checkpoints), models.template.config
    if config.engine.backend == "hf":
        assert tasks is not None
        gradient = (0, 0)
        if config.search.start == "ascent" and (card or engine.device == "meta"):  # a run on a CPU plans nothing by it
            planned = engine if engine.device == "meta" else make_describing_engine(config, models, card)
            gradient = cast("HFEngine", planned).gradient_bytes(tasks.longest, tasks.n_scored)
        return plan_hf(
            shapes,
            model_config,
            itemsize=itemsize,
            n_models=n_models,
            n_padded=tasks.n_padded,
            n_scored=tasks.n_scored,
            n_cached=tasks.n_cached,
            gradient=gradient,
            card=card,
        )
    options = {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} if card == 0 else {}
    options |= {"max_num_batched_tokens": engine.batch_tokens, **config.engine.vllm.options}
    return plan_vllm(shapes, model_config, itemsize=itemsize, n_models=n_models, card=card, options=options)


def with_transformers(config: StudyConfig, n_chunks: int, device: str = "auto") -> StudyConfig:
    """A study that vLLM scores, as its ascent sees it: on the transformers engine.

    Args:
        config: The study file.
        n_chunks: Into which the study's documents are cut.
        device: The engine's.
    """
    engine = config.engine.model_copy(update={"backend": "hf", "device": device})
    search = config.search.model_copy(update={"start": "ascent"})
    study = config.study.model_copy(update={"n_chunks": n_chunks})
    return config.model_copy(update={"engine": engine, "search": search, "study": study})


def plan_ascent(config: StudyConfig, models: StudyModels, scorer: Scorer, card: int | None = None) -> MemoryPlan:
    """How the ascent of a study that vLLM scores would fill the memory of the GPU, before vLLM starts.

    Args:
        config: The study file.
        models: Its checkpoints.
        scorer: Its eval tasks, for vLLM.
        card: As for :func:`plan_memory`.
    """
    apart = with_transformers(config, scorer.n_chunks)
    engine = make_describing_engine(apart, models, card)
    return plan_memory(apart, models, engine, card, scorer.on(engine).describe())


def lacking_for_ascent(config: StudyConfig, models: StudyModels, scorer: Scorer, card: int | None = None) -> str:
    """Why vLLM's GPU cannot run the study's ascent; "" if it can, or if the study's own engine runs it.

    Args:
        config: The study file.
        models: Its checkpoints.
        scorer: Its eval tasks, for vLLM.
        card: As for :func:`plan_memory`.
    """
    if config.engine.backend != "vllm":
        return ""
    options = config.engine.vllm.options
    n_cards = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))
    if n_cards > 1:
        return f"an ascent runs on one card, and vLLM takes {n_cards} here"
    if not _card(config, card):
        return ""
    plan = plan_ascent(config, models, scorer, card)
    return f"an ascent needs {gib(plan.used)}, the card has {gib(plan.card)}" if plan.left < 0 else ""


def merge_device(config: StudyConfig, engine_device: str) -> torch.device:
    """Where models are merged: ``engine.merge_device``, or the engine's device if that is ``auto``."""
    wanted = config.engine.merge_device
    return torch.device(engine_device if wanted == "auto" else wanted)


def build_scorer(config: StudyConfig, engine: Engine, *, with_usual_metrics: bool = False) -> Scorer:
    """The eval tasks of a study file, with their requests prepared for an engine.

    Args:
        config: The study file.
        engine: Renders and tokenizes; to describe only, it needs no weights.
        with_usual_metrics: Let each task choose its metric, see ``EvalTask``, instead of the study file.
    """
    holdout = config.holdout
    return Scorer.build(
        engine,
        [_eval_task(task, with_usual_metrics) for task in config.tasks],
        task_search_path=config.task_search_path,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        shuffle=config.shuffle,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        holdout=None if holdout is None else holdout.fraction or [_eval_task(task) for task in holdout.tasks],
        seed=config.study.seed,
        n_chunks=config.study.n_chunks,
        allow_unsafe_code=config.allow_unsafe_code,
        judge=make_judge(config),
    )


def _make_vllm_engine(config: StudyConfig, models: StudyModels) -> MakingEngine:
    """The vLLM engine of a study, its workers told where the models are; vLLM itself starts with the first merge."""
    from optuna_merge.evaluation.engines.vllm_instance import require_vllm

    engine = _vllm_engine(config, models)
    quantization = config.engine.vllm.quantization
    if engine.device == "cpu" and quantization is not None and _ON_A_GPU.search(quantization):
        raise EngineError(
            f"engine.vllm.quantization must be left out on a CPU, got {quantization}; vLLM quantizes on a GPU: remove"
            " it, or run the study on one"
        )
    require_vllm()
    plan = plan_memory(config, models, engine)
    plan.check()
    share = {"gpu_memory_utilization": plan.utilization} if plan.card else {"kv_cache_memory_bytes": plan.kv_cache}
    return _vllm_engine(config, models, share)


def _vllm_engine(config: StudyConfig, models: StudyModels, defaults: Mapping[str, Any] | None = None) -> MakingEngine:
    from optuna_merge.evaluation.engines.vllm import VLLMEngine

    if models.template.whole is not None:
        raise EngineError(
            f"engine.backend must be hf when language models are merged with {models.template.reference}, which sees or"
            " hears, got vllm; vLLM can serve the exported model"
        )
    description = describe_merger(
        models.resolved, models.refs.tokenizer_source, config.engine.merge_device, matrices_folder(config)
    )
    engine = VLLMEngine(
        models.described,
        shapes={name: models.template.shape(name) for name in models.names},
        dtype=models.refs.dtype,
        weights_factory=(FACTORY, description),
        options={**(defaults or {}), **config.engine.vllm.options},
        trust_remote_code=config.engine.trust_remote_code,
    )
    if config.engine.device not in ("auto", engine.device, engine.device.partition(":")[0]):
        raise EngineError(
            f"engine.device must be auto for vllm, which runs on {engine.device}, got {config.engine.device};"
            " choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    return engine


def _card(config: StudyConfig, card: int | None) -> int:
    """Bytes of memory of the GPU that a study runs on; 0 if it runs on none."""
    if card is not None:
        return card
    on_gpu = torch.cuda.is_available() and config.engine.device != "cpu"
    return torch.cuda.get_device_properties(0).total_memory if on_gpu else 0


def _require_device(device: torch.device) -> None:
    n_devices = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= n_devices:
        raise EngineError(
            f"engine.merge_device must be a device of this machine, got {device} ({n_devices} CUDA devices found); use"
            " cpu or auto (--no-merge-cuda, or leave the option out)"
        )


def _eval_task(task: TaskConfig, with_usual_metric: bool = False) -> EvalTask:
    return EvalTask(task.name, task.weight, None if with_usual_metric else task.metric, task.metadata or None)
