"""What a study would do: its dimensions, tasks and memory, found without loading weights."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from optuna_merge.config.sections import StudyConfig
from optuna_merge.merging.placement import SourcePlan, free_host_bytes, merge_seconds
from optuna_merge.search.build import make_sampler, never_prunes
from optuna_merge.search.samplers import StableCmaEsSampler
from optuna_merge.search.space import SearchSpace
from optuna_merge.search.warm_start import find_warm_start
from optuna_merge.study.engines import build_scorer, make_describing_engine, plan_memory
from optuna_merge.study.models import StudyModels


@dataclass(frozen=True)
class Check:
    """What a study file would do.

    Attributes:
        models: Labels of the sources, then the base's reference.
        dtype: Of the merged model.
        n_tensors, n_parameters: Of each model.
        n_trials: Trials in all.
        space: ``n_dimensions``, ``population``, ``n_baselines``, ``first`` and ``last`` parameter name, and what
            ``warm_start`` comes to (None: without one).
        tasks: ``name``, ``weight`` (None: only in the holdout), ``metric``, ``metrics``, ``n_searched``, ``n_holdout``.
        n_documents, n_chunks, n_requests, longest: Of one evaluation; ``longest`` in tokens.
        chat_template: Whether prompts go through it, and why.
        device: Where it would run.
        sources: Where the models to merge live: ``placement``, ``n_bytes``, ``reason``, and ``seconds`` that reading
            them once takes, by a sample (None: the card is not here); None: vLLM's workers read them from files.
        memory: Bytes: the fields of ``MemoryPlan``, their sum ``device``, what is ``left`` of the ``card``;
            ``source_files`` and ``host_free`` of the host.
        memory_line: The same, for a reader.
        warnings: What is possible and probably not meant.
    """

    models: list[str]
    dtype: str
    n_tensors: int
    n_parameters: int
    n_trials: int
    space: dict[str, Any]
    tasks: list[dict[str, Any]]
    n_documents: int
    n_chunks: int
    n_requests: int
    longest: int
    chat_template: str
    device: str
    sources: dict[str, Any] | None
    memory: dict[str, int]
    memory_line: str
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check_study(config: StudyConfig, card: int | None = None) -> Check:
    """Open everything that a study file names, compare it, and count.

    Args:
        config: The study file.
        card: Bytes of the card that the study is meant for; None: the one that is found, if there is one.

    Raises:
        OptunaMergeError: With one line for each thing that would keep the study from running; also if it cannot fit
            into the card's memory.
    """
    models = StudyModels.open(config)
    engine = make_describing_engine(config, models, card)
    tasks = build_scorer(config, engine).describe()
    space = SearchSpace(config, models.refs)
    sampler = make_sampler(config, space)
    names = list(space.distributions)
    warm_start = find_warm_start(config, space)
    device = "cuda" if torch.cuda.is_available() or card else "cpu"
    memory = plan_memory(config, models, engine, card, tasks)
    memory.check(tasks.longest + 1)
    merge_device = _merge_device(config, device)
    sources = None if config.engine.backend == "vllm" else models.plan_sources(config, merge_device, memory)
    if sources is not None and sources.placement == "gpu":
        memory = replace(memory, sources=sources.n_bytes)
    return Check(
        models=[*space.labels, *([f"base {config.genome.base_model}"] if config.genome.base_model else [])],
        dtype=models.refs.dtype,
        n_tensors=len(models.template.names),
        n_parameters=sum(math.prod(models.template.shape(name)) for name in models.template.names),
        n_trials=config.study.n_trials,
        space={
            "n_dimensions": len(names),
            "population": sampler.population_size if isinstance(sampler, StableCmaEsSampler) else 1,
            "n_baselines": len(space.baselines),
            "first": names[0] if names else "",
            "last": names[-1] if names else "",
            "warm_start": warm_start and warm_start.describe(len(names)),
        },
        tasks=[
            {
                "name": task.name,
                "weight": task.weight if task.n_searched else None,
                "metric": task.metric,
                "metrics": list(task.metrics),
                "n_searched": task.n_searched,
                "n_holdout": task.n_holdout,
            }
            for task in tasks.tasks
        ],
        n_documents=tasks.n_documents,
        n_chunks=tasks.n_chunks,
        n_requests=tasks.n_requests,
        longest=tasks.longest,
        chat_template=tasks.chat_template_reason,
        device=device if config.engine.device == "auto" else config.engine.device,
        sources=None if sources is None else _describe(sources, models, merge_device),
        memory={
            **memory.as_dict(),
            "source_files": sum(checkpoint.nbytes for checkpoint in models.checkpoints.values()),
            "host_free": free_host_bytes(),
        },
        memory_line=memory.describe(),
        warnings=_warnings(config, space, tasks.n_chunks),
    )


def _merge_device(config: StudyConfig, device: str) -> torch.device:
    engine = device if config.engine.device == "auto" else config.engine.device
    return torch.device(engine if config.engine.merge_device == "auto" else config.engine.merge_device)


def _describe(plan: SourcePlan, models: StudyModels, device: torch.device) -> dict[str, Any]:
    is_here = device.type == "cpu" or torch.cuda.is_available()
    return {**asdict(plan), "seconds": merge_seconds(plan, models.views.values(), device) if is_here else None}


def _warnings(config: StudyConfig, space: SearchSpace, n_chunks: int) -> list[str]:
    unpruned = never_prunes(config, n_chunks)
    found = [unpruned] if unpruned else []
    if config.engine.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        found.append("vllm is not installed here, which run-study needs for engine.backend: vllm; see docs/vllm.md")
    if not space.distributions:
        found.append("nothing is searched: every parameter is a constant")
    if config.study.n_trials <= len(space.baselines):
        found.append(f"study.n_trials is {config.study.n_trials}: the {len(space.baselines)} baselines leave no search")
    if config.holdout is None:
        found.append("holdout is not set: the best of many trials looks better than it is, and nothing will show it")
    if config.genome.base_model in config.genome.models and config.genome.base_model not in config.sources:
        found.append("genome.base_model is also among genome.models: it gets no weights, its task vector is zero")
    return found
