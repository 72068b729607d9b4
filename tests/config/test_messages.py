"""One line for each wrong value."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.study_text import STUDY

ADDED = {
    "limit: 0": ":7: limit must be greater than 0.0, got 0; raise it",
    "limit: 2.5": ":7: limit must be a whole number, or a fraction below 1, got 2.5; correct it",
    "limit: .nan": ":7: limit must be finite, got nan; give a finite number",
    "num_fewshot: -1": ":7: num_fewshot must be at least 0, got -1; raise it",
    "num_fewshot: 1.5": ":7: num_fewshot must be a whole number, got 1.5; write it without quotes or fraction",
    "shuffle: 1": ":7: shuffle must be true or false, got 1; write true or false",
    "random_init: 'yes'": ":7: random_init must be true or false, got 'yes'; write true or false",
    "storage_path: [x]": ":7: storage_path must be a path, got ['x']; put it in quotes",
    "task_search_path: 3": ":7: task_search_path must be a list, got 3; write [a, b] or one item a line after '- '",
    "task_search_path: [., 3]": ":7: task_search_path[1] must be a path, got 3; put it in quotes",
    "study: 3": ":7: study must be a mapping of keys, got 3; indent the keys below it",
    "study: []": ":7: study must be a mapping of keys, got []; indent the keys below it",
    "study:\n  n_trials: 0": ":8: study.n_trials must be at least 1, got 0; raise it",
    "study:\n  n_trials: 1e2": (
        ":8: study.n_trials must be a whole number, got '1e2'; write it without quotes or fraction"
    ),
    "study: {seed: -1}": ":7: study.seed must be at least 0, got -1; raise it",
    "study: {seed: 4294967296}": ":7: study.seed must be less than 4294967296, got 4294967296; lower it",
    "study: {timeout: 1e-3}": (
        ":7: study.timeout must be a number, got '1e-3';"
        " write it without quotes; YAML wants 1.0e-3 where others write 1e-3"
    ),
    "study: {n_chunks: 0}": ":7: study.n_chunks must be at least 1, got 0; raise it",
    "study: {name: 2026}": ":7: study.name must be text, got 2026; put it in quotes",
    "study: {name: team/one}": (
        ":7: study.name must be a name that can be part of a file name, got 'team/one'; correct it"
    ),
    'study: {name: "two\\nlines"}': (
        ":7: study.name must be a name that can be part of a file name, got 'two\\nlines'; correct it"
    ),
    f"study: {{name: {'é' * 101}}}": (
        ":7: study.name must be a name of at most 200 bytes, because files are named after it, got"
        f" '{'é' * 76}...; correct it"
    ),
    "study: {name: ..}": ":7: study.name must be a name that can be part of a file name, got '..'; correct it",
    "study: {sampler: cma}": (
        ":7: study.sampler.name must be cmaes, gp, nsga2, random, tpe, or the import path of a sampler class,"
        " got 'cma'; correct it"
    ),
    "study: {sampler: [cmaes]}": (
        ":7: study.sampler must be a mapping of keys, got ['cmaes']; indent the keys below it"
    ),
    "study: {sampler: {popsize: 2}}": ":7: study.sampler.popsize must be at least 3, got 2; raise it",
    "study: {sampler: {name: tpe, sigma0: 0.2}}": (
        ":7: study.sampler.sigma0 must be absent for tpe, got 0.2; it belongs to cmaes: remove it"
    ),
    "study: {sampler: {name: tpe, seed: 5}}": (":7: study.sampler.seed must be absent for tpe, got 5; use study.seed"),
    "study: {sampler: {name: random, popsize: 8}}": (
        ":7: study.sampler.popsize must be absent for random, got 8; it belongs to cmaes: remove it"
    ),
    "study: {sampler: {name: random, popsise: 8}}": (
        ":7: study.sampler.popsise must be a known key, got 'popsise'; known keys: name"
    ),
    "study: {sampler: {name: 3}}": ":7: study.sampler.name must be text, got 3; put it in quotes",
    "study: {sampler: {sigma0: 2}}": ":7: study.sampler.sigma0 must be at most 1.0, got 2; lower it",
    "study: {sampler: {popsiz: 8}}": (
        ":7: study.sampler.popsiz must be a known key, got 'popsiz'; did you mean 'popsize'?"
    ),
    "study: {goal: front}": ":7: study.goal must be 'sum' or 'pareto', got 'front'; choose one of them",
    "study: {goal: pareto}": (
        ":5: tasks must make several objectives for study.goal pareto, got 'letters' alone; name another objective for"
        " some or leave study.goal out"
    ),
    "study: {pruner: wilcoxn}": (
        ":7: study.pruner.name must be one of 'wilcoxon', 'none', got 'wilcoxn'; choose one of them"
    ),
    "study:\n  pruner:\n    name: [none]": (
        ":9: study.pruner.name must be one of 'wilcoxon', 'none', got ['none']; choose one of them"
    ),
    "study: {pruner: [none]}": (":7: study.pruner must be a mapping of keys, got ['none']; indent the keys below it"),
    "study: {pruner: {name: none, p_threshold: 0.2}}": (
        ":7: study.pruner.p_threshold must be absent for none, got 0.2; it belongs to wilcoxon: remove it"
    ),
    "study: {pruner: median}": (
        ":7: study.pruner must be wilcoxon or none (without median, hyperband, successive_halving, which compared"
        " single noisy chunks), got 'median'; correct it"
    ),
    "study: {pruner: {name: wilcoxon, wilcoxon: {p_threshold: 0.1}}}": (
        ":7: study.pruner.wilcoxon must be a known key, got 'wilcoxon'; known keys: n_startup_steps, name, p_threshold"
    ),
    "study: {pruner: {p_threshold: 1}}": ":7: study.pruner.p_threshold must be less than 1.0, got 1; lower it",
    "study: {pruner: {p_treshold: 0.2}}": (
        ":7: study.pruner.p_treshold must be a known key, got 'p_treshold'; did you mean 'p_threshold'?"
    ),
    "engine: {backend: tf}": ":7: engine.backend must be 'hf' or 'vllm', got 'tf'; choose one of them",
    "engine: {device: gpu}": ":7: engine.device must be auto, cpu, cuda or cuda:<index>, got 'gpu'; correct it",
    "engine: {merge_device: 'cuda:'}": (
        ":7: engine.merge_device must be auto, cpu, cuda or cuda:<index>, got 'cuda:'; correct it"
    ),
    "engine: {dtype: fp16}": (
        ":7: engine.dtype must be 'auto', 'float32', 'float16' or 'bfloat16', got 'fp16'; choose one of them"
    ),
    "engine: {batch_size: 0}": (
        ":7: engine.batch_size must be auto or a whole number of at least 1, got 0; correct it"
    ),
    "engine: {batch_size: true}": (
        ":7: engine.batch_size must be auto or a whole number of at least 1, got True; correct it"
    ),
    "engine: {batchsize: 8}": ":7: engine.batchsize must be a known key, got 'batchsize'; did you mean 'batch_size'?",
    "search: 3": ":7: search must be a mapping of keys, got 3; indent the keys below it",
    "search: {weight: [2, 0]}": (
        ":7: search.weight must be a range whose low is not above its high, got [2, 0]; correct it"
    ),
    "search: {weight: [1]}": ":7: search.weight must be a list of two numbers, [low, high], got [1]; correct it",
    "search: {weight: {low: 0, high: 1, start: 3}}": (
        ":7: search.weight must be a range whose start lies inside it,"
        " got {'low': 0, 'high': 1, 'start': 3}; correct it"
    ),
    "search: {weight: {low: 0}}": ":7: search.weight.high must be given, got nothing; add it",
    "search: {weight: {low: 0, high: 1, strat: 1}}": (
        ":7: search.weight.strat must be a known key, got 'strat'; did you mean 'start'?"
    ),
    "search: {weight: true}": (
        ":7: search.weight must be a number (constant), [low, high] or {low: ..., high: ..., start: ...},"
        " got True; correct it"
    ),
    "search: {weight: [0, .inf]}": ":7: search.weight.high must be finite, got inf; give a finite number",
    "search: {weight: [-1, 1]}": (
        ":7: search.weight.low must be at least 0, got -1; raise it or set genome.allow_negative_weights: true"
    ),
    "search: {lambda: [0, 9]}": (
        ":7: search.lambda must be in [0, 4], got [0, 9]; lambda is the scale of the summed task vector"
    ),
    "search: {wieght: 1}": (
        ":7: search.wieght must be a parameter of task_arithmetic, got 'wieght'; did you mean 'weight'?"
    ),
    "search: {xyz: 1}": (
        ":7: search.xyz must be a parameter of task_arithmetic, got 'xyz'; known: weight, lambda, embed_group, prior,"
        " warm_start, start, profile"
    ),
    "search: {embed_group: none}": ":7: search.embed_group must be 'shared' or 'own', got 'none'; choose one of them",
    "search: {prior: {common: -1}}": ":7: search.prior.common must be at least 0.0, got -1; raise it",
    "search: {prior: {weight: 0}}": ":7: search.prior.weight must be at least 0.001, got 0; raise it",
    "search: {prior: {model: 11}}": ":7: search.prior.model must be at most 10.0, got 11; lower it",
    "search: {prior: {wieght: 1}}": (
        ":7: search.prior.wieght must be a known key, got 'wieght'; did you mean 'weight'?"
    ),
    "search: {prior: {name: isotropic, common: 0.1}}": (
        ":7: search.prior.common must be absent for isotropic, got 0.1; it belongs to structured: remove it"
    ),
    "search: {prior: isotropc}": (
        ":7: search.prior.name must be one of 'structured', 'isotropic', got 'isotropc'; choose one of them"
    ),
    "search: {prior: 3}": ":7: search.prior must be a mapping of keys, got 3; indent the keys below it",
    "holdout: 1.5": ":7: holdout must be less than 1.0, got 1.5; lower it",
    "holdout: 0": ":7: holdout must be greater than 0.0, got 0; raise it",
    "holdout: other": ":7: holdout must be a fraction between 0 and 1, or a list of tasks, got 'other'; correct it",
    "holdout: []": ":7: holdout must be either a fraction between 0 and 1 or a list of tasks, got []; correct it",
    "holdout: {fraction: 0.2, tasks: [x]}": (
        ":7: holdout must be either a fraction between 0 and 1 or a list of tasks,"
        " got {'fraction': 0.2, 'tasks': ['x']}; correct it"
    ),
    "holdout:\n  - other\n  - {name: x, wieght: 1}": (
        ":9: holdout[1].wieght must be a known key, got 'wieght'; did you mean 'weight'?"
    ),
    "holdout: {tasks: [{name: x, wieght: 1}]}": (
        ":7: holdout[0].wieght must be a known key, got 'wieght'; did you mean 'weight'?"
    ),
    "holdout: {fraction: 0.2, task: [x]}": ":7: holdout.task must be a known key, got 'task'; did you mean 'tasks'?",
    "holdout: [letters]": ":7: holdout[0].name must be none of tasks, got 'letters'; use a fraction instead",
    "holdout: [x, x]": ":7: holdout[1] must be different from the others, got 'x' again; remove one",
    "genomes: 3": ":7: genomes must be a known key, got 'genomes'; did you mean 'genome'?",
    "path: x": (
        ":7: path must be a known key, got 'path'; known keys: allow_benchmark_tasks, allow_unsafe_code,"
        " apply_chat_template, engine, fewshot_as_multiturn, genome, holdout, judge, limit, num_fewshot, random_init,"
        " search, shuffle, storage_path, study, task_search_path, tasks"
    ),
    "path:": (
        ":7: path must be a known key, got 'path'; known keys: allow_benchmark_tasks, allow_unsafe_code,"
        " apply_chat_template, engine, fewshot_as_multiturn, genome, holdout, judge, limit, num_fewshot, random_init,"
        " search, shuffle, storage_path, study, task_search_path, tasks"
    ),
    "engin:": ":7: engin must be a known key, got 'engin'; did you mean 'engine'?",
    "engine:\n  3: x": (
        ":8: engine.3 must be a known key, got '3'; known keys: backend, batch_size, device, dtype, merge_device,"
        " sources, trust_remote_code, vllm"
    ),
    "num fewshot: 3": ":7: num fewshot must be a known key, got 'num fewshot'; did you mean 'num_fewshot'?",
    "limit: 5\nlimit: 6": ":8: limit must be given once, got it again; remove one of the two",
    "study: {seed: 1, seed: 2}": ":7: study.seed must be given once, got it again; remove one of the two",
}


@pytest.mark.parametrize(("text", "expected"), ADDED.items(), ids=list(ADDED))
def test_a_wrong_value_gets_one_line(problems: Any, text: str, expected: str) -> None:
    assert problems(STUDY + text + "\n") == [f"my_study.yaml{expected}"]
