"""Values that are each allowed, but not together."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from optuna_merge.config.benchmarks import is_benchmark
from optuna_merge.config.messages import _short
from optuna_merge.config.sections import _SEARCH_KEYS, PRUNER_OPTIONS, StudyConfig
from optuna_merge.errors import MethodError


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
