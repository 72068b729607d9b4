"""All problems of a file at once, each with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.problem import Problem, short
from tests.config.study_text import STUDY


def test_a_pruner_that_is_none_still_has_its_unknown_options_named(problems: Any) -> None:
    assert problems(STUDY + "study:\n  pruner: {name: wilcoxn, n_startup_steps: 1, p_treshold: 0.2}\n") == [
        "my_study.yaml:8: study.pruner.name must be one of 'wilcoxon', 'none', got 'wilcoxn'; choose one of them",
        "my_study.yaml:8: study.pruner.p_treshold must be a known key, got 'p_treshold'; did you mean 'p_threshold'?",
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
