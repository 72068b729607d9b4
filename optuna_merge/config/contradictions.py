"""Values that are each allowed, but not together.

Knows the rules between keys, one function for each subject; does not know what a single value may be.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from optuna_merge.config.benchmarks import is_benchmark
from optuna_merge.config.judge import BEST_SOURCE
from optuna_merge.config.problem import Problem, short
from optuna_merge.config.sampler import SAMPLERS, CmaEsConfig, OptunaSamplerConfig
from optuna_merge.config.search import Range, SearchConfig
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import MethodError
from optuna_merge.methods import MergeMethod, MethodParameter, find_method


def contradictions(config: StudyConfig) -> Iterator[Problem]:
    """Everything that each value alone allows and their combination does not."""
    yield from _repeated(config)
    yield from _filters(config)
    yield from _weights_of_tasks(config)
    yield from _benchmarks(config)
    yield from _holdout(config)
    yield from _task_folders(config)
    yield from _one_score(config) if config.study.goal == "sum" else _several_objectives(config)
    yield from _sampler(config)
    yield from _warm_start(config)
    yield from _race(config)
    unknown = list(_unknown_methods(config))
    yield from unknown
    if unknown:
        return
    methods = config.methods
    yield from _tokenizer(config)
    yield from _against(config)
    for method in methods:
        yield from _base_model(config, method)
        yield from _number_of_models(config, method)
    yield from _switches(config, methods)
    yield from _ranges(config, methods)
    if config.search.start == "ascent":
        yield from ascent_problems(config)


def _unknown_methods(config: StudyConfig) -> Iterator[Problem]:
    for index, name in enumerate(config.method_names):
        try:
            find_method(name)
        except MethodError as exc:
            key = "genome.merge_method" + (f"[{index}]" if len(config.method_names) > 1 else "")
            yield Problem(key, "be a known merge method", repr(name), exc.fix or "correct it")


def _race(config: StudyConfig) -> Iterator[Problem]:
    if len(config.method_names) == 1:
        return
    rule, fix = "be absent for several merge methods", "remove it or name one method"
    if config.study.goal != "sum":
        yield Problem("study.goal", "be sum for several merge methods", config.study.goal, fix)
    if config.search.warm_start is not None:
        yield Problem("search.warm_start", rule, repr(config.search.warm_start.label), fix)


def _repeated(config: StudyConfig) -> Iterator[Problem]:
    held_out = config.holdout.tasks if config.holdout else ()
    for key, values in (
        ("genome.models", [(model,) for model in config.genome.models]),
        ("genome.merge_method", [(name,) for name in config.method_names]),
        ("genome.filters", [(part,) for part in config.genome.filters]),
        ("tasks", [(task.name, task.metric) for task in config.tasks]),
        ("holdout", [(task.name, task.metric) for task in held_out]),
    ):
        for index, value in enumerate(values):
            if value in values[:index]:
                yield Problem(f"{key}[{index}]", "be different from the others", f"{value[0]!r} again", "remove one")


def _filters(config: StudyConfig) -> Iterator[Problem]:
    filters = config.genome.filters
    if "rest" in filters:
        key, rule = f"genome.filters[{filters.index('rest')}]", "be another part of a tensor name"
        yield Problem(
            key, rule, "'rest'", "in parameter names, rest means all other tensors: write more of the tensor name"
        )


def _weights_of_tasks(config: StudyConfig) -> Iterator[Problem]:
    if all(task.weight == 0 for task in config.tasks):
        yield Problem("tasks", "be a list with a weight other than 0", "only 0", "give one a weight")


def _benchmarks(config: StudyConfig) -> Iterator[Problem]:
    if config.allow_benchmark_tasks:
        return
    fix = (
        "a merge searched on a benchmark has been fitted to it: use other documents, or set allow_benchmark_tasks: true"
    )
    for index, task in enumerate(config.tasks):
        if is_benchmark(task.name):
            yield Problem(f"tasks[{index}].name", "be no known benchmark's own task", repr(task.name), fix)


def _holdout(config: StudyConfig) -> Iterator[Problem]:
    searched = {task.name for task in config.tasks}
    for index, task in enumerate(config.holdout.tasks if config.holdout else ()):
        if task.name in searched:
            yield Problem(f"holdout[{index}].name", "be none of tasks", repr(task.name), "use a fraction instead")


def _task_folders(config: StudyConfig) -> Iterator[Problem]:
    for index, folder in enumerate(config.task_search_path):
        if not folder.is_dir():
            fix = "in the study file, paths are relative to it"
            yield Problem(f"task_search_path[{index}]", "be a folder", str(folder), fix)


def _one_score(config: StudyConfig) -> Iterator[Problem]:
    for index, task in enumerate(config.tasks):
        if task.objective:
            fix = "remove it or set study.goal: pareto"
            yield Problem(f"tasks[{index}].objective", "be absent for one score", repr(task.objective), fix)


def _several_objectives(config: StudyConfig) -> Iterator[Problem]:
    sampler, pruner = config.study.sampler.name, config.study.pruner.name
    if len(config.objectives) < 2:
        yield Problem(
            "tasks",
            "make several objectives for study.goal pareto",
            f"{config.objectives[0]!r} alone",
            "name another objective for some or leave study.goal out",
        )
    if sampler == "cmaes" or sampler.rpartition(".")[2] == "CmaEsSampler":
        yield Problem(
            "study.sampler",
            "search several objectives for study.goal pareto",
            f"{sampler}, which searches one",
            "use gp, nsga2, tpe or random",
        )
    if pruner != "none":
        yield Problem(
            "study.pruner",
            "be none for study.goal pareto",
            pruner,
            "no single score says which trial is worse: remove it",
        )


def _sampler(config: StudyConfig) -> Iterator[Problem]:
    sampler = config.study.sampler
    if not isinstance(sampler, OptunaSamplerConfig):
        return
    for option in CmaEsConfig.model_fields:
        if option in sampler.options:
            got = short(sampler.options[option])
            yield Problem(
                f"study.sampler.{option}", f"be absent for {sampler.name}", got, "it belongs to cmaes: remove it"
            )
    if sampler.name in SAMPLERS and "seed" in sampler.options:  # of other classes, search/named.py knows more
        got = short(sampler.options["seed"])
        yield Problem("study.sampler.seed", f"be absent for {sampler.name}", got, "use study.seed")


def _warm_start(config: StudyConfig) -> Iterator[Problem]:
    warm_start, sampler = config.search.warm_start, config.study.sampler.name
    if warm_start is None:
        return
    key, got = "search.warm_start", repr(warm_start.label)
    if sampler != "cmaes":
        yield Problem(key, f"be absent for {sampler}", got, "remove it or use cmaes")
    if config.random_init:
        yield Problem(key, "be absent for random_init", got, "remove one of the two")


def ascent_problems(config: StudyConfig) -> Iterator[Problem]:
    """Everything that keeps a study with a known merge method from beginning with an ascent."""
    yield from gradient_problems(config)
    sampler, key, rule = config.study.sampler.name, "search.start", "be uniform for"
    if config.study.goal == "sum" and sampler != "cmaes":
        yield Problem(key, f"{rule} {sampler}", "ascent", "cmaes alone begins at its end: remove one of the two")
    if config.random_init:
        yield Problem(key, f"{rule} random_init", "ascent", "remove one of the two")


def gradient_problems(config: StudyConfig) -> Iterator[Problem]:
    """Everything that keeps an ascent from running, whatever searches after it."""
    key, rule = "search.start", "be uniform for"
    if config.study.goal != "sum":
        yield Problem(key, f"{rule} several objectives", "ascent", "the gradient is that of one score: remove it")
    has_base = config.genome.base_model is not None
    if not any(_is_followed(config, each) for method in config.methods for each in method.parameters_for(has_base)):
        fix = "no parameter that is searched has a derivative: remove it, or see optuna-merge methods"
        yield Problem(key, f"{rule} {_names(config.methods)}", "ascent", fix)


def _is_followed(config: StudyConfig, parameter: MethodParameter) -> bool:
    given = config.search.ranges.get(parameter.name)
    is_searched = parameter.search is not None if given is None else not given.is_constant
    return parameter.is_smooth and is_searched


def _base_model(config: StudyConfig, method: MergeMethod) -> Iterator[Problem]:
    key, base = "genome.base_model", config.genome.base_model
    if method.base == "required" and base is None:
        yield Problem(key, f"be given for {method.name}", "nothing", "name the model that all sources were tuned from")
    if method.base == "none" and base is not None:
        yield Problem(key, f"be absent for {method.name}", repr(base), "remove it")


def _tokenizer(config: StudyConfig) -> Iterator[Problem]:
    genome = config.genome
    if genome.tokenizer_source not in (None, "base", "union", genome.base_model, *genome.models):
        rule, got = "be base, union or one of the models", repr(genome.tokenizer_source)
        yield Problem("genome.tokenizer_source", rule, got, "spell it as in genome.models")


def _against(config: StudyConfig) -> Iterator[Problem]:
    genome, against = config.genome, None if config.judge is None else config.judge.against
    if against not in (None, BEST_SOURCE, genome.base_model, *genome.models):
        rule, got = f"be {BEST_SOURCE} or one of the models", repr(against)
        yield Problem("judge.against", rule, got, "spell it as in genome.models")


def _number_of_models(config: StudyConfig, method: MergeMethod) -> Iterator[Problem]:
    least, most = method.n_models_for(config.genome.base_model is not None)
    n_models = len(config.sources)
    if n_models < least or (most is not None and n_models > most):
        wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
        yield Problem("genome.models", f"name {wanted} models for {method.name}", f"{n_models}", "add or remove some")


def _switches(config: StudyConfig, methods: Sequence[MergeMethod]) -> Iterator[Problem]:
    for switch, is_on in (("normalize", config.genome.normalize), ("rescale", config.genome.rescale)):
        if is_on is not None and all(switch not in dict(method.switches) for method in methods):
            yield Problem(f"genome.{switch}", f"be absent for {_names(methods)}", f"{is_on}", "remove it")


def _ranges(config: StudyConfig, methods: Sequence[MergeMethod]) -> Iterator[Problem]:
    known: dict[str, list[MethodParameter]] = {}
    for method in methods:
        for parameter in method.parameters_for(config.genome.base_model is not None):
            known.setdefault(parameter.name, []).append(parameter)
    for name, interval in config.search.ranges.items():
        if name in known:
            for parameter in known[name]:
                yield from _bounds(config, parameter, interval)
            continue
        keys = [*known, *SearchConfig.own_keys()]
        near = difflib.get_close_matches(name, keys, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
        yield Problem(f"search.{name}", f"be a parameter of {_names(methods)}", repr(name), fix)


def _names(methods: Sequence[MergeMethod]) -> str:
    return " or ".join(method.name for method in methods)


def _bounds(config: StudyConfig, parameter: MethodParameter, interval: Range) -> Iterator[Problem]:
    name = parameter.name
    if not parameter.low <= interval.low <= interval.high <= parameter.high:
        yield Problem(
            f"search.{name}",
            f"be in [{parameter.low:g}, {parameter.high:g}]",
            f"[{interval.low:g}, {interval.high:g}]",
            f"{name} is the {parameter.meaning}",
        )
    if name == "weight" and interval.low < 0 and not config.genome.allow_negative_weights:
        fix = "raise it or set genome.allow_negative_weights: true"
        yield Problem("search.weight.low", "be at least 0", f"{interval.low:g}", fix)
