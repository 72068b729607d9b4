from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from optuna_merge.config.benchmarks import KNOWN_BENCHMARKS, is_benchmark
from optuna_merge.config.genome import GenomeConfig
from optuna_merge.config.paths import absolute_storage
from optuna_merge.config.problem import Problem, short
from optuna_merge.config.pruner import HyperbandConfig, MedianConfig, SuccessiveHalvingConfig, WilcoxonConfig
from optuna_merge.config.read import load_study
from optuna_merge.config.sampler import CmaEsConfig, OptunaSamplerConfig, RandomSamplerConfig
from optuna_merge.config.search import Range, StructuredPrior
from optuna_merge.config.section import Section
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.tasks import TaskConfig
from optuna_merge.errors import ConfigError
from optuna_merge.methods import METHODS

ROOT = Path(__file__).parents[2]

STUDY = """\
genome:
  models: [a, b]
  merge_method: task_arithmetic
  base_model: base
tasks:
  - name: letters
"""  # what a test adds begins in line 7


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str | bytes, overrides: dict[str, Any] | None = None) -> StudyConfig:
        path = tmp_path / "my_study.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_study(path, overrides)

    return load


@pytest.fixture
def problems(load: Any, tmp_path: Path) -> Any:
    """The lines of the error, without the folder."""

    def problems(text: str | bytes, overrides: dict[str, Any] | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]

    return problems


# A file as users of mergekit-evolve have: every key it knows, nothing of ours.
EVOLVE = """\
genome:
    models:
      - NousResearch/Hermes-2-Pro-Mistral-7B
      - PocketDoc/Dans-AdventurousWinds-Mk2-7b@main
      - HuggingFaceH4/zephyr-7b-beta
    merge_method: task_arithmetic
    base_model: mistralai/Mistral-7B-v0.1
    tokenizer_source: null
    layer_granularity: 8 # sane default
    allow_negative_weights: true # useful with task_arithmetic
    normalize: false
    smooth: false
    filters:
      - self_attn
      - mlp
tasks:
  - name: alpaca_prompt_format
    weight: 0.4
  - name: spartqa_train
    weight: 0.6
    metric: acc_norm,none
  - name: verbosity
    weight: -0.1
    metric: length,none
limit: 100
num_fewshot: 2
shuffle: true
random_init: false
apply_chat_template: false
fewshot_as_multiturn: false
"""


def test_a_mergekit_evolve_file_loads_as_it_stands(load: Any) -> None:
    config = load(EVOLVE)
    assert config.genome.models == (
        "NousResearch/Hermes-2-Pro-Mistral-7B",
        "PocketDoc/Dans-AdventurousWinds-Mk2-7b@main",
        "HuggingFaceH4/zephyr-7b-beta",
    )
    assert config.genome.base_model == "mistralai/Mistral-7B-v0.1"
    assert config.genome.tokenizer_source is None
    assert (config.genome.layer_granularity, config.genome.filters) == (8, ("self_attn", "mlp"))
    assert (config.genome.allow_negative_weights, config.genome.normalize, config.genome.smooth) == (True, False, False)
    assert [(t.name, t.weight, t.metric) for t in config.tasks] == [
        ("alpaca_prompt_format", 0.4, "acc,none"),
        ("spartqa_train", 0.6, "acc_norm,none"),
        ("verbosity", -0.1, "length,none"),
    ]
    assert (config.limit, config.num_fewshot, config.shuffle, config.random_init) == (100, 2, True, False)
    assert (config.apply_chat_template, config.fewshot_as_multiturn) == (False, False)
    assert config.method.name == "task_arithmetic"


def test_defaults(load: Any, tmp_path: Path) -> None:
    config = load(STUDY)
    assert config.study.name == "my_study"
    assert config.storage_path == tmp_path / "my_study_study"
    assert config.study.sampler.name == "cmaes"
    assert config.study.pruner.name == "wilcoxon"
    assert config.apply_chat_template is None
    assert config.holdout is None
    assert config.dtype is None
    assert config.engine.trust_remote_code is False
    assert config.allow_unsafe_code is False
    assert config.path == tmp_path / "my_study.yaml"


def test_the_config_is_frozen(load: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(STUDY).limit = 3


SHORT_FORMS = [
    ("study: {sampler: random}", "study.sampler.name", "random"),
    ("study: {pruner: none}", "study.pruner.name", "none"),
    ("holdout: 0.3", "holdout.fraction", 0.3),
    ("holdout: {fraction: 0.3}", "holdout.fraction", 0.3),
    ("holdout: [other]", "holdout.tasks", (TaskConfig(name="other"),)),
    ("holdout: {tasks: [{name: other, weight: 2}]}", "holdout.tasks", (TaskConfig(name="other", weight=2.0),)),
    ("search: {weight: 0.5}", "search.ranges", {"weight": Range(low=0.5, high=0.5)}),
    ("search: {weight: [0, 2]}", "search.ranges", {"weight": Range(low=0.0, high=2.0)}),
    (
        "search: {weight: {low: 0.1, high: 2, start: 1}}",
        "search.ranges",
        {"weight": Range(low=0.1, high=2.0, start=1.0)},
    ),
    ("search: {embed_group: own, prior: {common: 0}}", "search.prior.common", 0.0),
    ("engine: {batch_size: 4}", "engine.batch_size", 4),
    ("engine: {device: cuda:1, dtype: bfloat16}", "dtype", "bfloat16"),
    ("limit: 0.25", "limit", 0.25),
    ("limit: 1", "limit", 1.0),
    ("shuffle: yes", "shuffle", True),  # YAML 1.1's other spelling of true
    ("study: {timeout: 1.0e+3}", "study.timeout", 1000.0),
]


@pytest.mark.parametrize(("text", "key", "expected"), SHORT_FORMS, ids=[text for text, _, _ in SHORT_FORMS])
def test_forms_of_a_value(load: Any, text: str, key: str, expected: Any) -> None:
    value = load(STUDY + text)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_task_may_be_its_name(load: Any) -> None:
    text = STUDY.replace("- name: letters", "- letters\n  - {name: digits, metadata: {eos_text: null}}")
    assert load(text).tasks == (TaskConfig(name="letters"), TaskConfig(name="digits", metadata={"eos_text": None}))


def test_a_range_knows_whether_it_is_constant() -> None:
    assert Range(low=1.0, high=1.0).is_constant
    assert not Range(low=0.0, high=1.0).is_constant


# --- one line for each rule; {} stands for what is added to STUDY

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
    "study: {pruner: medain}": (
        ":7: study.pruner.name must be one of 'wilcoxon', 'median', 'hyperband', 'successive_halving', 'none',"
        " got 'medain'; choose one of them"
    ),
    "study:\n  pruner:\n    name: [median]": (
        ":9: study.pruner.name must be one of 'wilcoxon', 'median', 'hyperband', 'successive_halving', 'none',"
        " got ['median']; choose one of them"
    ),
    "study: {pruner: [median]}": (
        ":7: study.pruner must be a mapping of keys, got ['median']; indent the keys below it"
    ),
    "study: {pruner: {name: median, p_threshold: 0.2}}": (
        ":7: study.pruner.p_threshold must be absent for median, got 0.2; it belongs to wilcoxon: remove it"
    ),
    "study: {pruner: {min_resource: 2}}": (
        ":7: study.pruner.min_resource must be absent for wilcoxon, got 2; it belongs to hyperband and"
        " successive_halving: remove it"
    ),
    "study: {pruner: {name: median, median: {n_warmup_steps: 1}}}": (
        ":7: study.pruner.median must be a known key, got 'median'; known keys: n_startup_trials, n_warmup_steps, name"
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
        " warm_start"
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
        " apply_chat_template, engine, fewshot_as_multiturn, genome, holdout, limit, num_fewshot, random_init, search,"
        " shuffle, storage_path, study, task_search_path, tasks"
    ),
    "path:": (
        ":7: path must be a known key, got 'path'; known keys: allow_benchmark_tasks, allow_unsafe_code,"
        " apply_chat_template, engine, fewshot_as_multiturn, genome, holdout, limit, num_fewshot, random_init, search,"
        " shuffle, storage_path, study, task_search_path, tasks"
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


CHANGED = {
    ("[a, b]", "[]"): [":2: genome.models must be a list with at least 1 item, got []; add one"],
    ("[a, b]", "a"): [":2: genome.models must be a list, got 'a'; write [a, b] or one item a line after '- '"],
    ("[a, b]", "[no, 3]"): [
        ":2: genome.models[0] must be text, got False; put it in quotes",
        ":2: genome.models[1] must be text, got 3; put it in quotes",
    ],
    ("[a, b]", "[a, b, a]"): [":2: genome.models[2] must be different from the others, got 'a' again; remove one"],
    ("[a, b]", "[base]"): [
        ":2: genome.models must name at least 1 models for task_arithmetic, got 0; add or remove some"
    ],
    ("task_arithmetic", "task-arithmetic"): [
        ":3: genome.merge_method must be a known merge method, got 'task-arithmetic';"
        f" did you mean 'task_arithmetic'? (known: {', '.join(sorted(METHODS))})"
    ],
    ("  base_model: base\n", ""): [
        ":1: genome.base_model must be given for task_arithmetic, got nothing; name the model that all sources were"
        " tuned from"
    ],
    ("  base_model: base\n", "  base_model: base\n  layer_granularity: -1\n"): [
        ":5: genome.layer_granularity must be at least 0, got -1; raise it"
    ],
    ("  base_model: base\n", "  base_model: base\n  filters: [mlp, mlp, '']\n"): [
        ":5: genome.filters[2] must be a name, got ''; fill it in"
    ],
    ("  base_model: base\n", "  base_model: base\n  filters: [mlp, mlp, rest]\n"): [
        ":5: genome.filters[1] must be different from the others, got 'mlp' again; remove one",
        ":5: genome.filters[2] must be another part of a tensor name, got 'rest';"
        " in parameter names, rest means all other tensors: write more of the tensor name",
    ],
    ("  base_model: base\n", "  base_model: base\n  allow_negative_weight: true\n"): [
        ":5: genome.allow_negative_weight must be a known key, got 'allow_negative_weight';"
        " did you mean 'allow_negative_weights'?"
    ],
    ("  - name: letters\n", ""): [":5: tasks must be given, got nothing; add it"],
    ("  - name: letters\n", "  letters: 0.4\n"): [
        ":5: tasks must be a list, got {'letters': 0.4}; write [a, b] or one item a line after '- '"
    ],
    ("  - name: letters\n", "  - weight: 1\n"): [":6: tasks[0].name must be given, got nothing; add it"],
    ("  - name: letters\n", "  - name: ''\n"): [":6: tasks[0].name must be a name, got ''; fill it in"],
    ("  - name: letters\n", "  - name: a\n    weight: .nan\n    metrik: acc\n"): [
        ":8: tasks[0].metrik must be a known key, got 'metrik'; did you mean 'metric'?",
        ":7: tasks[0].weight must be finite, got nan; give a finite number",
    ],
    ("  - name: letters\n", "  - a\n  - a\n"): [
        ":7: tasks[1] must be different from the others, got 'a' again; remove one"
    ],
    ("  - name: letters\n", "  - {name: a, weight: 0}\n"): [
        ":5: tasks must be a list with a weight other than 0, got only 0; give one a weight"
    ],
    ("letters", "gsm8k"): [
        ":6: tasks[0].name must be no known benchmark's own task, got 'gsm8k'; a merge searched on a benchmark has been"
        " fitted to it: use other documents, or set allow_benchmark_tasks: true"
    ],
}


@pytest.mark.parametrize(("change", "expected"), CHANGED.items(), ids=[new.strip() or "-" for _, new in CHANGED])
def test_a_wrong_genome_or_task(problems: Any, change: tuple[str, str], expected: list[str]) -> None:
    assert STUDY.count(change[0]) == 1
    assert problems(STUDY.replace(*change)) == [f"my_study.yaml{line}" for line in expected]


def test_rules_of_a_method_s_declaration(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = dataclasses.replace(METHODS["linear"], name="pair", base="none", n_models=(2, 2), switches=())
    monkeypatch.setitem(METHODS, "pair", pair)
    text = (
        STUDY.replace("task_arithmetic", "pair")
        .replace("[a, b]", "[a, b, c]")
        .replace("tasks:", "  normalize: true\ntasks:")
    )
    assert problems(text) == [
        "my_study.yaml:4: genome.base_model must be absent for pair, got 'base'; remove it",
        "my_study.yaml:2: genome.models must name 2 models for pair, got 3; add or remove some",
        "my_study.yaml:5: genome.normalize must be absent for pair, got True; remove it",
    ]
    monkeypatch.setitem(METHODS, "pair", dataclasses.replace(pair, n_models=(2, 4), base="optional"))
    text = STUDY.replace("task_arithmetic", "pair").replace("[a, b]", "[a]")
    assert problems(text) == [
        "my_study.yaml:2: genome.models must name 2 to 4 models for pair, got 1; add or remove some"
    ]


def test_a_pruner_that_is_none_still_has_its_unknown_options_named(problems: Any) -> None:
    assert problems(STUDY + "study:\n  pruner: {name: medain, n_warmup_steps: 1, min_resorce: 2}\n") == [
        "my_study.yaml:8: study.pruner.name must be one of 'wilcoxon', 'median', 'hyperband', 'successive_halving',"
        " 'none', got 'medain'; choose one of them",
        "my_study.yaml:8: study.pruner.min_resorce must be a known key, got 'min_resorce';"
        " did you mean 'min_resource'?",
    ]


def test_what_a_wrong_value_leaves_behind_is_no_problem_of_its_own(problems: Any) -> None:
    text = (
        STUDY
        + "holdout: {fraction: 2}\nsearch: {weight: {low: x, high: 1, start: 3}, lambda: {low: 2, high: 1, a: }}\n"
    )
    assert [line.split(", got")[0] for line in problems(text)] == [
        "my_study.yaml:8: search.lambda.a must be a known key",
        "my_study.yaml:8: search.weight.low must be a number",
        "my_study.yaml:7: holdout must be less than 1.0",
        "my_study.yaml:8: search.lambda must be a range whose low is not above its high",
    ]


def test_all_problems_at_once(problems: Any) -> None:
    text = STUDY.replace("[a, b]", "[a, a]").replace("letters", "mmlu_anatomy")
    text += "study: {n_trials: many, sampler: cma}\nengin: {}\ntask_search_path: nowhere\nsearch: {weight: [-1, 1]}\n"
    assert [line.split(" must ")[0] for line in problems(text)] == [
        "my_study.yaml:8: engin",
        "my_study.yaml:7: study.n_trials",
        "my_study.yaml:7: study.sampler.name",
        "my_study.yaml:2: genome.models[1]",
        "my_study.yaml:6: tasks[0].name",
        "my_study.yaml:9: task_search_path[0]",
        "my_study.yaml:10: search.weight.low",
    ]


# --- the file itself


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r": study file must be a mapping of keys, got nothing; see studies/quickstart\.yaml"),
        ("# later\n", r": study file must be a mapping of keys, got nothing;"),
        ("- a\n", r": study file must be a mapping of keys, got \['a'\];"),
        ("just words", r": study file must be a mapping of keys, got 'just words';"),
        (STUDY + "study:\n\tname: x\n", r": study file must be YAML, got .*'\\t'.*line 8.*; correct that line"),
        (STUDY + "limit: [1\n", r": study file must be YAML, got .*line 7"),
        (STUDY + "---\n" + STUDY, r": study file must be YAML, got expected a single document"),
        (
            STUDY + "study: !!python/object:os.system {}\n",
            r": study file must be YAML, got could not determine a constr",
        ),
        (b"genome: \xff\xfe\n", r": study file must be readable text, got 'utf-8' codec .*; check the path"),
        (STUDY + "study: &s {name: *s}\n", r": study file must end, got an anchor within itself; write it out"),
    ],
)
def test_what_is_no_study_file(load: Any, text: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"my_study\.yaml" + expected) as caught:
        load(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_and_an_anchor_are_fine(load: Any) -> None:
    assert load(b"\xef\xbb\xbf" + STUDY.encode() + b"study: {<<: {seed: 3}, n_trials: 4}\n").study.seed == 3


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(STUDY)
    with pytest.raises(
        ConfigError, match=r"quikstart.yaml: study file must exist; did you mean .*/quickstart\.yaml\?$"
    ):
        load_study(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"study file must exist; give the path of a study file$"):
        load_study(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match=r"study file must be readable text, got .*[Dd]irectory.*; check the path$"):
        load_study(tmp_path)


# --- paths, nulls, overrides


TWO_TASKS = STUDY + "  - {name: other, objective: style}\n"


def test_several_objectives_have_their_own_sampler_and_no_pruner(load: Any) -> None:
    config = load(TWO_TASKS + "study: {goal: pareto}\n")
    assert config.objectives == ("letters", "style")
    assert (config.study.sampler.name, config.study.pruner.name) == ("tpe", "none")
    assert load(TWO_TASKS + "study: {goal: pareto, sampler: nsga2}\n").study.sampler.name == "nsga2"
    assert load(STUDY).objectives == ("score",)


def test_what_several_objectives_cannot_have(problems: Any) -> None:
    wrong = problems(TWO_TASKS + "study: {goal: pareto, sampler: cmaes, pruner: median}\n")
    assert wrong == [
        "my_study.yaml:8: study.sampler must search several objectives for study.goal pareto, got cmaes, which searches"
        " one; use gp, nsga2, tpe or random",
        "my_study.yaml:8: study.pruner must be none for study.goal pareto, got median; no single score says which trial"
        " is worse: remove it",
    ]
    [line] = problems(TWO_TASKS)
    assert line.endswith("objective must be absent for one score, got 'style'; remove it or set study.goal: pareto")


def test_relative_paths_start_at_the_file(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    config = load(STUDY + "storage_path: out/here\ntask_search_path: tasks\n")
    assert config.storage_path == tmp_path / "out/here"
    assert config.task_search_path == (tmp_path / "tasks",)
    assert load(STUDY + "storage_path: /abs\n").storage_path == Path("/abs")
    assert load(STUDY, {"storage_path": "x", "task_search_path": ["tasks"]}).storage_path == tmp_path / "x"
    monkeypatch.setenv("HOME", "/home/me")
    assert load(STUDY + "storage_path: ~/x\n").storage_path == Path("/home/me/x")


def test_a_missing_task_folder(problems: Any, tmp_path: Path) -> None:
    assert problems(STUDY + "task_search_path: [., nowhere]\n") == [
        "my_study.yaml:7: task_search_path[1] must be a folder, got nowhere; paths are relative to the study file"
    ]


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a study file may leave out."""
    keys = []
    for name, field in model.model_fields.items():
        if name in ("path", "ranges") or (prefix == "" and name in ("genome", "tasks")):
            continue
        keys += [] if field.is_required() and name != "storage_path" else [f"{prefix}{name}"]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


NULLABLE = [*_keys(StudyConfig), "search.weight", *(_keys(GenomeConfig, "genome."))]


@pytest.mark.parametrize("key", NULLABLE)
def test_a_key_without_a_value_means_its_default(load: Any, key: str) -> None:
    if key == "genome.base_model":
        text = STUDY.replace("task_arithmetic", "linear").replace("base_model: base", "base_model:")
        assert load(text).genome.base_model is None
        return
    if key.startswith("genome."):
        text = STUDY.replace("tasks:", f"  {key.removeprefix('genome.')}:\ntasks:")
    else:
        *outer, last = key.split(".")
        text = STUDY + "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate([*outer, last]))
    assert load(text) == load(STUDY)


UNION_OPTIONS = [
    (section, name, option)
    for section, members in (
        ("study.sampler", (CmaEsConfig,)),
        ("study.pruner", (WilcoxonConfig, MedianConfig, HyperbandConfig, SuccessiveHalvingConfig)),
        ("search.prior", (StructuredPrior,)),
    )
    for member in members
    for name in [member.model_fields["name"].default]
    for option in member.known_keys()
    if option != "name"
]


@pytest.mark.parametrize(("section", "name", "option"), [*UNION_OPTIONS, ("study.sampler", "tpe", "multivariate")])
def test_an_option_without_a_value_means_its_default(load: Any, section: str, name: str, option: str) -> None:
    outer, inner = section.split(".")
    assert load(f"{STUDY}{outer}: {{{inner}: {{name: {name}, {option}: }}}}\n") == load(
        f"{STUDY}{outer}: {{{inner}: {name}}}\n"
    )


def test_an_option_without_a_name_is_the_default_s(load: Any) -> None:
    text = "study: {sampler: {popsize: 5}, pruner: {name: , p_threshold: 0.2}}\nsearch: {prior: {common: 0.3}}\n"
    config = load(STUDY + text)
    assert config.study.sampler == CmaEsConfig(popsize=5)
    assert config.study.pruner == WilcoxonConfig(p_threshold=0.2)
    assert config.search.prior == StructuredPrior(common=0.3)


def test_the_options_of_a_sampler_or_pruner(load: Any) -> None:
    config = load(
        STUDY + "study: {sampler: {name: tpe, n_startup_trials: 20}, pruner: {name: median, n_warmup_steps: 2}}"
    )
    assert config.study.sampler == OptunaSamplerConfig.model_validate({"name": "tpe", "n_startup_trials": 20})
    assert (config.study.sampler.options, config.study.pruner.options) == (
        {"n_startup_trials": 20},
        {"n_warmup_steps": 2},
    )
    assert config.study.cmaes == CmaEsConfig()
    assert load(STUDY + "study: {sampler: {sigma0: 0.1}}").study.cmaes.sigma0 == 0.1
    assert isinstance(load(STUDY + "study: {sampler: random}").study.sampler, RandomSamplerConfig)


@pytest.mark.parametrize("text", ["", "study: {sampler: tpe, pruner: none}\nsearch: {prior: isotropic}\n"])
def test_a_config_is_written_as_json_without_a_warning(load: Any, text: str) -> None:
    dumped = load(STUDY + text).model_dump(mode="json")
    assert (dumped["path"], dumped["study"]["name"]) == (str(load(STUDY).path), "my_study")


@pytest.mark.parametrize("key", ["weight", "metric", "metadata"])
def test_a_key_of_a_task_without_a_value_means_its_default(load: Any, key: str) -> None:
    assert load(f"{STUDY}    {key}:\n") == load(STUDY)


def test_overrides_replace_what_the_file_says(load: Any) -> None:
    text = STUDY + "study: {sampler: cmaes, n_trials: 5}\nengine:\n"
    config = load(
        text,
        {
            "study.n_trials": 7,
            "study.sampler.popsize": 8,
            "engine.device": "cpu",
            "search.prior.common": 0.1,
            "limit": 3,
        },
    )
    assert (config.study.n_trials, config.study.sampler.name, config.study.sampler.popsize) == (7, "cmaes", 8)
    assert (config.engine.device, config.search.prior.common, config.limit) == ("cpu", 0.1, 3)


def test_overrides_are_checked_too(problems: Any) -> None:
    assert problems(STUDY, {"study.n_trials": 0, "nope": 1}) == [
        "my_study.yaml: nope must be a known key, got 'nope'; did you mean 'genome'?",
        "my_study.yaml: study.n_trials must be at least 1, got 0; raise it",
    ]
    # What the file has wrongly in the place of the section is not covered up.
    assert problems(STUDY + "study: mine\n", {"study.n_trials": 3}) == [
        "my_study.yaml:7: study must be a mapping of keys, got 'mine'; indent the keys below it"
    ]


# --- problems


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("tasks[1].weight", "s.yaml:6"),
        ("tasks[2].weight", "s.yaml:4"),
        ("genome.base_model", "s.yaml:1"),
        ("limit", "s.yaml"),
        ("study.n_trials", "s.yaml"),
    ],
)
def test_a_problem_names_the_line_of_its_key_or_of_the_section_that_lacks_it(key: str, where: str) -> None:
    lines = {"genome": 1, "tasks": 4, "tasks[1]": 5, "tasks[1].weight": 6, "study": 7, "study.n_trials": 0}
    problem = Problem(key, "be at least 1 (a must b: c)", "0", "raise it")
    assert problem.located(Path("s.yaml"), lines) == (
        f"{where}: {key} must be at least 1 (a must b: c), got 0; raise it"
    )


def test_a_long_value_is_cut() -> None:
    assert short("x" * 100) == "'" + "x" * 76 + "..."
    assert (short(0.1), short(float("nan")), short([1])) == ("0.1", "nan", "[1]")


# --- the rest


def test_sources_leave_out_the_base_where_it_has_no_task_vector(load: Any) -> None:
    text = STUDY.replace("[a, b]", "[a, base, b]")
    assert load(text).sources == ("a", "b")
    assert load(text.replace("task_arithmetic", "linear")).sources == ("a", "base", "b")


@pytest.mark.parametrize("task", ["mmlu", "mmlu_anatomy", "gsm8k-de", "hellaswag", "arc_easy", "tinyMMLU", "sst2"])
def test_benchmarks_are_refused(load: Any, task: str) -> None:
    assert is_benchmark(task)
    text = STUDY.replace("letters", task)
    with pytest.raises(ConfigError, match=re.escape(f"must be no known benchmark's own task, got '{task}'")):
        load(text)
    assert load(text + "allow_benchmark_tasks: true\n").tasks[0].name == task


@pytest.mark.parametrize(
    "task", ["spartqa_train", "gsm8k_train", "alpaca_prompt_format", "arctic", "my_mmlu", "racecar"]
)
def test_other_tasks_are_no_benchmarks(task: str) -> None:
    assert not is_benchmark(task)


def test_the_benchmarks_are_sorted_and_each_is_there_once() -> None:
    assert list(KNOWN_BENCHMARKS) == sorted(set(KNOWN_BENCHMARKS), key=str.lower)


def _sections(parent: type[Section] = Section) -> list[type[Section]]:
    """Every section that has keys."""
    found = [inner for section in parent.__subclasses__() for inner in (section, *_sections(section))]
    return [section for section in found if section.model_fields]


@pytest.mark.parametrize("section", _sections(), ids=lambda section: section.__name__)
def test_every_key_is_documented(section: type[Section]) -> None:
    attributes = (section.__doc__ or "").partition("Attributes:")[2]
    documented = {
        name.strip()
        for names in re.findall(r"^ {8}(\w[\w, ]*):", attributes, re.MULTILINE)
        for name in names.split(",")
    }
    # The tasks and sections that have a class of their own are documented there.
    own = {"genome", "tasks", "study", "engine", "search"} if section is StudyConfig else set()
    assert documented | own == set(section.model_fields)


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_the_study_files_of_the_repository_load(path: Path) -> None:
    config = load_study(path)
    assert config.study.name == path.stem
    assert path.read_text().splitlines()[0].startswith("# ")
    assert path.read_text().splitlines()[0].endswith("?")
    for folder in config.task_search_path:
        assert folder.is_dir()


@pytest.mark.parametrize("source", ["base", "union", "a", "base_model"])
def test_tokenizer_source_is_one_of_the_models(load: Any, source: str) -> None:
    text = STUDY.replace("base_model: base", f"base_model: base_model\n  tokenizer_source: {source}")
    assert load(text).genome.tokenizer_source == source


def test_a_tokenizer_source_that_is_none(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"my_study.yaml:5: genome.tokenizer_source must be base, union or one of "):
        load(STUDY.replace("base_model: base", "base_model: base\n  tokenizer_source: other"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a/study.db", "sqlite:////folder/a/study.db"),
        ("sqlite+pysqlite:///study.db", "sqlite+pysqlite:////folder/study.db"),
        ("journal://study.log", "journal:///folder/study.log"),
        ("sqlite:////a/study.db", "sqlite:////a/study.db"),
        ("journal:///a/study.log", "journal:///a/study.log"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_a_relative_storage_starts_at_a_folder(url: str, expected: str) -> None:
    assert absolute_storage(url, Path("/folder")) == expected


def test_a_relative_storage_starts_at_the_file(load: Any, tmp_path: Path) -> None:
    assert load(STUDY + "study: {storage: 'sqlite:///s.db'}\n").study.storage == f"sqlite:///{tmp_path}/s.db"


def test_an_override_has_no_line(problems: Any) -> None:
    assert problems(STUDY + "study: {n_trials: 3}\n", {"study.n_trials": 0}) == [
        "my_study.yaml: study.n_trials must be at least 1, got 0; raise it"
    ]
