"""Values that are each allowed, but not together."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.benchmarks import KNOWN_BENCHMARKS, is_benchmark
from optuna_merge.errors import ConfigError
from optuna_merge.methods import METHODS
from tests.config.study_text import STUDY, TWO_TASKS

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
    ("task_arithmetic", "xyz"): [
        f":3: genome.merge_method must be a known merge method, got 'xyz'; known: {', '.join(sorted(METHODS))}"
    ],
    ("task_arithmetic", "no_such_package.x"): [
        ":3: genome.merge_method must be a known merge method, got 'no_such_package.x'; is its folder on PYTHONPATH?"
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


def test_what_several_objectives_cannot_have(problems: Any) -> None:
    wrong = problems(TWO_TASKS + "study: {goal: pareto, sampler: cmaes, pruner: wilcoxon}\n")
    assert wrong == [
        "my_study.yaml:8: study.sampler must search several objectives for study.goal pareto, got cmaes, which searches"
        " one; use gp, nsga2, tpe or random",
        "my_study.yaml:8: study.pruner must be none for study.goal pareto, got wilcoxon; no single score says which"
        " trial is worse: remove it",
    ]
    [line] = problems(TWO_TASKS)
    assert line.endswith("objective must be absent for one score, got 'style'; remove it or set study.goal: pareto")


@pytest.mark.parametrize(
    ("added", "complaints"),
    [
        ("", []),
        ("study: {sampler: {name: cmaes, gp_every: 3}}\n", []),
        ("study: {sampler: gp}\n", ["be uniform for gp, got ascent; cmaes alone begins at its end"]),
        ("random_init: true\n", ["be uniform for random_init, got ascent; remove one"]),
        ("study: {goal: pareto}\n", ["be uniform for several objectives, got ascent; the gradient"]),
    ],
)
def test_what_an_ascent_needs(problems: Any, load: Any, added: str, complaints: list[str]) -> None:
    text = TWO_TASKS.replace(", objective: style", "") if "pareto" in added else STUDY
    text += "search: {start: ascent}\n" + added
    if not complaints:
        assert load(text).search.profile == "tensor"
        return
    for line, complaint in zip(problems(text), complaints, strict=True):
        assert f"search.start must {complaint}" in line


def test_an_ascent_needs_a_parameter_with_a_derivative(problems: Any) -> None:
    [line] = problems(STUDY + "search: {start: ascent, weight: 0.5}\n")
    assert line.endswith(
        "search.start must be uniform for task_arithmetic, got ascent; no parameter that is searched has a derivative:"
        " remove it, or see optuna-merge methods"
    )


def test_a_missing_task_folder(problems: Any, tmp_path: Path) -> None:
    assert problems(STUDY + "task_search_path: [., nowhere]\n") == [
        "my_study.yaml:7: task_search_path[1] must be a folder, got nowhere; in the study file, paths are relative to"
        " it"
    ]


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


@pytest.mark.parametrize("source", ["base", "union", "a", "base_model"])
def test_tokenizer_source_is_one_of_the_models(load: Any, source: str) -> None:
    text = STUDY.replace("base_model: base", f"base_model: base_model\n  tokenizer_source: {source}")
    assert load(text).genome.tokenizer_source == source


def test_a_tokenizer_source_that_is_none(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"my_study.yaml:5: genome.tokenizer_source must be base, union or one of "):
        load(STUDY.replace("base_model: base", "base_model: base\n  tokenizer_source: other"))
