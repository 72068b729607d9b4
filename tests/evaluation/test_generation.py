from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from optuna_merge.evaluation.engines.beginnings import NO_BEGINNINGS
from optuna_merge.evaluation.engines.generation import Generation, Prompt, plan_generation
from optuna_merge.testing.conformance import TextRequest

PLAN: dict[str, Any] = {
    "window": 100,
    "eos": "</s>",
    "settings": {},
    "decodes": True,
    "beginnings": NO_BEGINNINGS,
    "longest_continued": None,
    "batch_tokens": 60,
    "step_tokens": 10.0,
    "n_most_rows": 1000,
    "n_most_cached": 10**6,
}


def asked(length: int, first: int = 0, **options: Any) -> tuple[TextRequest, Sequence[int]]:
    request = TextRequest("generate_until", ("", {"until": ["\n"], "max_gen_toks": 5, **options}))
    return request, [first, *range(1, length)]


def plan(*requests: tuple[TextRequest, Sequence[int]], **changes: Any) -> Generation:
    return plan_generation(list(requests), **{**PLAN, **changes})


def test_prompts_are_sorted_by_length_and_cut_into_passes() -> None:
    made = plan(*(asked(length, first) for length in (10, 30, 20) for first in (0, 1)), asked(30))
    assert [len(prompt.tokens) for prompt in made.prompts] == [30, 30, 20, 20, 10, 10]
    assert made.prompts[0] == Prompt((0, *range(1, 30)), ("\n", "</s>"), 5)
    assert made.prompt_of == [4, 5, 0, 1, 2, 3, 0]
    assert made.pieces == [[0, 1], [2, 3, 4, 5]]  # the last two fill no pass of their own
    assert made.n_padded == 80
    assert made.n_tokens == 150


def test_a_prompt_is_cut_from_the_left_to_make_room_for_the_text() -> None:
    assert plan(asked(99)).prompts[0].tokens == tuple(range(4, 99))


def test_rows_that_go_together() -> None:
    requests = [asked(10, first) for first in range(20)]
    assert plan(*requests, batch_tokens=8000).n_rows == 1000
    assert plan(*requests, batch_tokens=8000).n_together == 20
    assert plan(*requests, batch_tokens=80).n_rows == 10
    scarce = plan(*requests, batch_tokens=8000, n_most_cached=61)
    assert max(map(len, scarce.pieces)) == 4  # of 10 tokens and 5 to come
    assert scarce.n_cached == 61 + 40
    assert plan(*requests, batch_tokens=8000).n_cached == 20 * 15 + 200


def test_what_generation_costs() -> None:
    # a sixth of a batch for the pass, four steps of 10, and one and a half for each token that a step makes
    one = plan(asked(10))
    assert one.cost == 10 + 60 / 6 + 4 * 10 + 1.5 * 4
    # a step of two rows costs little more
    assert plan(asked(10), asked(10, 1)).cost == one.cost + 10 + 1.5 * 4
    assert plan(asked(10), asked(10)).cost == one.cost
    assert plan(asked(10, max_gen_toks=1)).cost == 10 + 60 / 6
    # 30 texts in seven places
    many = plan(*(asked(10, first) for first in range(30)))
    assert many.cost == 300 + len(many.pieces) * 10 + 18 * 10 + 1.5 * 120
    assert plan().cost == plan().n_cached == plan().n_padded == 0


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"do_sample": True, "temperature": 0.5}, {}),
        ({"temperature": 0.5}, {}),
        ({"num_beams": 3}, {}),
        ({"unknown": 3}, {}),
        ({"until": [3]}, {}),
        ({}, {"num_beams": 3}),
        ({}, {"min_new_tokens": 3}),
    ],
)
def test_requests_for_lm_eval(options: dict[str, Any], settings: dict[str, Any]) -> None:
    made = plan(asked(10, **options), asked(10, 1, **options), settings=settings)
    assert made.prompt_of == [None, None]
    assert (made.prompts, made.pieces, made.batch_size) == ([], [], 7)
    assert made.n_padded == 20
    assert made.cost == 20 + 10 + 4 * 10 + 1.5 * 8
    assert plan(asked(10), decodes=False).prompt_of == [None]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"do_sample": False, "temperature": 0.5, "top_p": 0.9}, {}),
        ({"num_beams": 1, "until": "\n"}, {}),
        ({}, {"temperature": 0.5, "top_k": 20, "do_sample": True, "max_length": 7, "eos_token_id": [1, 2]}),
        ({}, {"cache_implementation": "hybrid", "transformers_version": "5", "_from_model_config": True}),
    ],
)
def test_greedy_requests(options: dict[str, Any], settings: dict[str, Any]) -> None:
    assert plan(asked(10, **options), settings=settings).prompts == plan(asked(10)).prompts


def test_a_tasks_penalty_precedes_the_models() -> None:
    settings = {"repetition_penalty": 1.1}
    assert plan(asked(10), settings=settings).prompts[0].penalty == 1.1
    assert plan(asked(10, repetition_penalty=1.2), settings=settings).prompts[0].penalty == 1.2
