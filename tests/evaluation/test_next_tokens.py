from __future__ import annotations

import random

from optuna_merge.evaluation.engines.batches import Item
from optuna_merge.evaluation.engines.next_tokens import MAX_TOKENS, NextTokens, Plan, Whole, make_plan


def log_probability(prompt: tuple[int, ...], token: int) -> float:
    """A model whose answer is different for every prompt and token."""
    return -random.Random(repr((prompt, token))).random()


def answers(plan: Plan, items: list[Item]) -> list[float]:
    found = []
    for index in range(len(items)):
        steps = plan.steps[index]
        if steps is None:
            whole = plan.wholes[plan.whole_of[index]]
            found.append(
                sum(
                    log_probability(whole.tokens[:n], whole.tokens[n])
                    for n in range(whole.n_context, len(whole.tokens))
                )
            )
        else:
            assert all(token in plan.questions[question].tokens for question, token in steps)
            found.append(sum(log_probability(plan.questions[question].prompt, token) for question, token in steps))
    return found


def expected(items: list[Item]) -> list[float]:
    return [
        sum(log_probability(item.context + item.continuation[:n], token) for n, token in enumerate(item.continuation))
        for item in items
    ]


def test_choices_of_one_token_are_one_question() -> None:
    plan = make_plan([Item((1, 2), (token,)) for token in (9, 7, 8, 7)], block_size=4)
    assert plan.questions == [NextTokens((1, 2), (7, 8, 9))]
    assert plan.steps == [[(0, 9)], [(0, 7)], [(0, 8)], [(0, 7)]]
    assert plan.n_tokens == 2
    assert not plan.wholes


def test_choices_of_several_tokens_share_their_beginning() -> None:
    context = tuple(range(100, 132))
    plan = make_plan([Item(context, (4, 5)), Item(context, (6, 7, 8)), Item(context, (4, 9))], block_size=16)
    prompts = [question.prompt[32:] for question in plan.questions]
    assert prompts == [(), (4,), (6,), (6, 7)]  # a prefix before what extends it
    assert [question.tokens for question in plan.questions] == [(4, 6), (5, 9), (7,), (8,)]
    assert plan.n_tokens == 32 + 1 + 1 + 2  # two full blocks are remembered


def test_a_long_text_is_computed_whole() -> None:
    text = tuple(range(200))
    items = [Item(text[:1], text[1:]), Item((7, 8), (9,)), Item(text[:1], text[1:])]
    plan = make_plan(items, block_size=16)
    assert plan.wholes == [Whole(text, 1)]
    assert plan.whole_of == {0: 0, 2: 0}
    assert plan.wholes[0].prompt == text[:-1]
    assert plan.prompts == [(7, 8), text[:-1]]
    assert plan.n_tokens == 199 + 2


def test_more_tokens_than_a_question_may_name() -> None:
    items = [Item((1, 2, 3), (token,)) for token in range(300)]
    plan = make_plan(items, block_size=16)
    assert [len(question.tokens) for question in plan.questions] == [MAX_TOKENS, MAX_TOKENS, 300 - 2 * MAX_TOKENS]
    assert answers(plan, items) == expected(items)


def test_every_item_is_answered_by_its_own_prompts() -> None:
    rnd = random.Random(0)
    contexts = [tuple(rnd.randrange(3) for _ in range(rnd.randint(1, 40))) for _ in range(12)]
    items = [
        Item(rnd.choice(contexts), tuple(rnd.randrange(3) for _ in range(rnd.choice((1, 1, 2, 3, 30)))))
        for _ in range(200)
    ]
    for block_size in (1, 4, 16, 1000):
        plan = make_plan(items, block_size=block_size)
        assert all(abs(a - b) < 1e-9 for a, b in zip(answers(plan, items), expected(items), strict=True))
        seen: set[tuple[int, ...]] = set()
        for question in plan.questions:
            assert question.prompt[:-1] in seen or question.prompt in contexts
            seen.add(question.prompt)
    assert make_plan([], block_size=16).prompts == []
