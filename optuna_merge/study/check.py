"""What a study file would do: its search space, eval tasks and memory, found without loading weights.

Knows how to open and count; does not print (``cli/check.py`` does) and runs no trial.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from optuna_merge.config.problem import short
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.description import Description
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.merging.placement import PlacementPlan, free_host_bytes, merge_seconds
from optuna_merge.search.ascent import Schedule
from optuna_merge.search.build import make_sampler, never_prunes
from optuna_merge.search.race import Spaces, make_spaces
from optuna_merge.search.samplers import StableCmaEsSampler
from optuna_merge.search.space import SearchSpace
from optuna_merge.search.warm_start import find_warm_start
from optuna_merge.study.description import describe_ascent, describe_race
from optuna_merge.study.engines import (
    build_scorer,
    lacking_for_ascent,
    make_describing_engine,
    merge_device,
    plan_ascent,
    plan_memory,
)
from optuna_merge.study.judges import check_study_judge, most_questions
from optuna_merge.study.kept import KeptPlan, plan_kept
from optuna_merge.study.memory import MemoryPlan, gib
from optuna_merge.study.models import StudyModels
from optuna_merge.study.rivals import find_against
from optuna_merge.study.seconds import TrialSeconds, estimate_ascent, estimate_trial
from optuna_merge.study.start import few_documents, settle_start


@dataclass(frozen=True)
class Check:
    """What a study file would do.

    Attributes:
        models: Labels of the sources, then ``base`` and the base's reference.
        dtype: The merged model's.
        n_tensors, n_parameters: Of each model, without those that are ``copied``.
        copied: What only one model has besides language: its ``model``, the ``names`` of its tensors, ``n_parameters``,
            and the ``parts`` they belong to; None if there is nothing such.
        n_trials: Trials in total.
        space: ``n_dimensions``, ``population``, ``n_baselines``, the ``first`` and ``last`` parameter name, and a
            description of ``warm_start``, of the ascent and of the race (None without one), in which the others are
            those of the first method.
        tasks: ``name``, ``weight`` (None for a task that only the holdout has), ``metric``, ``metrics``,
            ``n_searched``, ``n_holdout``, and ``has_gradient``: whether the metric has a differentiable stand-in (None
            for a task that only the holdout has).
        n_documents, n_chunks, n_requests, longest: Of one evaluation; ``longest`` is in tokens.
        chat_template: Whether prompts go through the chat template, and why.
        device: Where the study would run.
        sources: Where the sources would live: ``placement``, ``n_bytes``, ``reason``, and ``seconds``, an estimate
            from a sample of how long it takes to read them once (None if there is no GPU here). None with vLLM,
            whose workers read them from files.
        kept: What the method makes once and keeps for all trials: ``folder``, ``n_bytes`` on disk, ``seconds``, an
            estimate from a sample of how long the first merge takes to make it, and bytes of ``memory`` that this needs
            on the host, and ``disk_free``; None if it keeps nothing.
        memory: Bytes: the fields of ``MemoryPlan``, their sum ``device``, and how many are ``left`` of the ``card``;
            ``source_files`` and ``host_free`` on the host.
        memory_line: The same in words.
        judge: ``model``, ``url``, ``budget``, the ``most`` questions that the study can ask, and ``against``: with
            whose answers others are compared, if not with those of the documents; None without a judge.
        trial_seconds: Expected seconds of a trial on all documents: ``merging``, ``choices`` and ``texts``, from
            samples that are run here; None with vLLM and for a device that is not here.
        ascent_seconds: Expected seconds of the ascent, from the same samples; None without either.
        warnings: What is allowed, but probably not meant.
    """

    models: list[str]
    dtype: str
    n_tensors: int
    n_parameters: int
    copied: dict[str, Any] | None
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
    kept: dict[str, Any] | None
    memory: dict[str, int]
    memory_line: str
    judge: dict[str, Any] | None
    trial_seconds: dict[str, float] | None
    ascent_seconds: float | None
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check_study(config: StudyConfig, card: int | None = None) -> Check:
    """Open everything that a study file names, compare it, and count.

    Args:
        config: The study file.
        card: Bytes of memory of the GPU that the study is meant for. Default: of the GPU here, if there is one.

    Raises:
        OptunaMergeError: If anything that the file names cannot be used, or does not fit into the GPU's memory.
    """
    given = config
    check_study_judge(config)
    models = StudyModels.open(config)
    engine = make_describing_engine(config, models, card)
    scorer = build_scorer(config, engine)
    config, why_uniform = settle_start(config, scorer, lambda: lacking_for_ascent(given, models, scorer, card))
    tasks = scorer.describe()
    spaces = make_spaces(config, models.refs)
    space = next(iter(spaces.values()))
    counts = _describe_space(config, models, spaces, scorer)
    counts["why_uniform"] = why_uniform if why_uniform and len(spaces) == 1 else None
    memory = plan_memory(config, models, engine, card, tasks)
    memory.check(tasks.longest + 1)
    if config.engine.backend == "vllm" and config.search.start == "ascent":
        before = plan_ascent(config, models, scorer, card)
        before.check()
        memory = replace(memory, ascent=before.used)
    device = config.engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or card else "cpu"
    placed_on = merge_device(config, device)
    placement = None if config.engine.backend == "vllm" else models.plan_placement(config, placed_on, memory)
    if placement is not None and placement.placement == "gpu":
        memory = replace(memory, sources=placement.n_bytes)
    seconds = None
    if config.engine.backend == "hf" and not card:
        seconds = estimate_trial(
            config.of_method(config.method_names[0]),
            models,
            space,
            tasks,
            batch_tokens=engine.batch_tokens,
            merge_device=placed_on,
            device=torch.device(device),
        )
    shapes = [models.template.shape(name) for name in models.names if name not in models.template.copied]
    kept = plan_kept(config, shapes)
    return Check(
        models=[*space.labels, *([f"base {config.genome.base_model}"] if config.genome.base_model else [])],
        dtype=models.refs.dtype,
        n_tensors=len(shapes),
        n_parameters=sum(map(math.prod, shapes)),
        copied=_describe_copied(models),
        n_trials=config.study.n_trials,
        space=counts,
        tasks=_describe_tasks(tasks, scorer.without_gradient()),
        n_documents=tasks.n_documents,
        n_chunks=tasks.n_chunks,
        n_requests=tasks.n_requests,
        longest=tasks.longest,
        chat_template=tasks.chat_template_reason,
        device=device,
        sources=None if placement is None else _describe_placement(placement, models, placed_on),
        kept=None if kept is None else asdict(kept),
        memory=_describe_memory(memory, models),
        memory_line=memory.describe(),
        judge=_describe_judge(config, tasks, counts["n_baselines"], find_against(config, scorer.rivals)),
        trial_seconds=None if seconds is None else asdict(seconds),
        ascent_seconds=_ascent_seconds(config, seconds, tasks.n_chunks),
        warnings=[
            *_warnings(config, space, tasks.n_chunks),
            *filter(None, [few_documents(config, models, space, tasks.n_documents)]),
            *_kept_warnings(kept),
            *map(_shared_question_warning, tasks.shared_questions, tasks.shared_questions.values()),
        ],
    )


def _describe_space(config: StudyConfig, models: StudyModels, spaces: Spaces, scorer: Scorer) -> dict[str, Any]:
    first = next(iter(spaces))
    space = spaces[first]
    sampler = make_sampler(config.of_method(first), space)
    warm_start = find_warm_start(config, space)
    names = list(space.distributions)
    return {
        "n_dimensions": len(names),
        "population": sampler.population_size if isinstance(sampler, StableCmaEsSampler) else 1,
        "n_baselines": len(space.baselines)
        if len(spaces) == 1
        else 1 + sum(b.kind != "uniform" for b in space.baselines),
        "first": names[0] if names else "",
        "last": names[-1] if names else "",
        "warm_start": warm_start and warm_start.describe(len(names)),
        "ascent": describe_ascent(config, models, space, scorer.n_chunks)
        if config.search.start == "ascent" and len(spaces) == 1
        else None,
        "race": describe_race(config, spaces, scorer) if len(spaces) > 1 else None,
    }


def _describe_copied(models: StudyModels) -> dict[str, Any] | None:
    whole = models.template
    copied = [name for name in models.names if name in whole.copied]
    if not copied:
        return None
    merged = {prefix for name in models.names if name not in whole.copied for prefix in _prefixes(name)}
    parts = dict.fromkeys(next(prefix for prefix in _prefixes(name) if prefix not in merged) for name in copied)
    return {
        "model": whole.reference,
        "n_parameters": sum(math.prod(whole.shape(name)) for name in copied),
        "parts": list(parts),
        "names": copied,
    }


def _prefixes(name: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _ascent_seconds(config: StudyConfig, trial: TrialSeconds | None, n_chunks: int) -> float | None:
    if config.search.start == "uniform" or trial is None:
        return None
    schedule = Schedule.draw(n_chunks, config.study.seed)
    n_passes = sum(map(len, schedule.batches)) / n_chunks
    return estimate_ascent(trial, n_passes=n_passes, n_steps=schedule.n_steps)


def _describe_tasks(tasks: Description, without_gradient: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": task.name,
            "weight": task.weight if task.n_searched else None,
            "metric": task.metric,
            "metrics": list(task.metrics),
            "n_searched": task.n_searched,
            "n_holdout": task.n_holdout,
            "has_gradient": task.name not in without_gradient if task.n_searched else None,
        }
        for task in tasks.tasks
    ]


def _describe_judge(
    config: StudyConfig, tasks: Description, n_baselines: int, against: str | None
) -> dict[str, Any] | None:
    judge = config.judge
    if judge is None:
        return None
    most = most_questions(config, tasks, n_baselines)
    return {"model": judge.model, "url": judge.url, "budget": judge.budget, "most": most, "against": against}


def _describe_placement(plan: PlacementPlan, models: StudyModels, device: torch.device) -> dict[str, Any]:
    is_here = device.type == "cpu" or torch.cuda.is_available()
    return {**asdict(plan), "seconds": merge_seconds(plan, models.views.values(), device) if is_here else None}


def _describe_memory(memory: MemoryPlan, models: StudyModels) -> dict[str, int]:
    return {
        **memory.as_dict(),
        "source_files": sum(checkpoint.nbytes for checkpoint in models.checkpoints.values()),
        "host_free": free_host_bytes(),
    }


def _kept_warnings(kept: KeptPlan | None) -> list[str]:
    if kept is None:
        return []
    found = []
    if kept.n_bytes > kept.disk_free:
        found.append(
            f"{kept.folder} will need {gib(kept.n_bytes)}, only {gib(kept.disk_free)} are free: choose another"
            " storage_path, unless it is full of these matrices already"
        )
    if kept.memory > free_host_bytes():
        found.append(f"making the kept matrices needs {gib(kept.memory)} of host memory, more than is free")
    return found


def _shared_question_warning(task: str, question: str) -> str:
    return (
        f"task {task}: every document asks {short(question)}; if that names a field, write"
        " {{...}} around it in doc_to_text"
    )


def _warnings(config: StudyConfig, space: SearchSpace, n_chunks: int) -> list[str]:
    unpruned = never_prunes(config, n_chunks)
    found = [unpruned] if unpruned else []
    if config.engine.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        found.append("vllm is not installed here; run-study needs it for engine.backend: vllm; see docs/vllm.md")
    if not space.distributions:
        found.append("nothing is searched: every parameter is a constant")
    if config.study.n_trials <= len(space.baselines):
        found.append(
            f"study.n_trials is {config.study.n_trials}: nothing is searched after {len(space.baselines)} baselines"
        )
    if config.holdout is None:
        found.append("holdout is not set: the best of many trials looks better than it is, and nothing will show it")
    if config.genome.base_model in config.genome.models and config.genome.base_model not in config.sources:
        found.append(
            "genome.base_model is also among genome.models: it gets no weights, because its task vector is zero"
        )
    return found
