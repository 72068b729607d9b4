from __future__ import annotations

import itertools
import random

from optuna_merge.evaluation.engines.beginnings import MIN_TOKENS, Beginnings, Tokens, choose_beginnings

SYSTEM: Tokens = tuple(range(25))
EXAMPLES: Tokens = (*SYSTEM, *range(100, 400))
INSTRUCTIONS: Tokens = (*SYSTEM, *range(500, 600))


def questions(beginning: Tokens, n: int, first: int) -> list[Tokens]:
    return [(*beginning, number, *range(20)) for number in range(first, first + n)]


def choose(contexts: list[Tokens], n_most_cached: int = 10_000) -> list[Tokens]:
    return list(choose_beginnings(contexts, pass_tokens=170, n_most_cached=n_most_cached).tokens)


def test_the_deepest_beginnings_and_one_for_the_rest() -> None:
    contexts = [
        *questions(EXAMPLES, 80, 1000),
        *questions(INSTRUCTIONS, 80, 2000),
        *questions(SYSTEM, 50, 3000),
        *questions((), 5, 4000),
    ]
    random.Random(0).shuffle(contexts)
    assert choose(contexts) == [EXAMPLES, INSTRUCTIONS, SYSTEM]
    assert choose([*contexts, *contexts]) == [EXAMPLES, INSTRUCTIONS, SYSTEM]
    # those that save the most and fit
    assert choose(contexts, n_most_cached=349) == [EXAMPLES]
    assert choose(contexts, n_most_cached=150) == [INSTRUCTIONS, SYSTEM]


def test_a_fork_that_does_not_pay() -> None:
    contexts = [*questions((*SYSTEM, 50, 51), 5, 1000), *questions((*SYSTEM, 60, 61), 5, 2000)]
    assert choose(contexts) == [SYSTEM]
    assert choose(questions(SYSTEM, 7, 1000)) == []  # 6 x 25 tokens are less than a pass
    assert choose(questions(SYSTEM[: MIN_TOKENS - 1], 1000, 1000)) == []


def test_a_context_that_others_begin_with() -> None:
    contexts = [EXAMPLES[:n] for n in range(25, 325)]
    chosen = choose(contexts)
    assert SYSTEM in chosen
    assert set(chosen) < set(contexts)
    assert choose([SYSTEM]) == choose([SYSTEM, SYSTEM]) == choose([]) == []


def test_no_other_choice_saves_more() -> None:
    def saved(contexts: list[Tokens], tokens: tuple[Tokens, ...]) -> float:
        beginnings = Beginnings(tokens)
        found = [beginnings.of(context, 1) for context in contexts]
        return sum(map(beginnings.length, found)) - sum(len(beginning) + 170 for beginning in tokens)

    rnd = random.Random(1)
    for _ in range(20):
        forks = [SYSTEM]
        forks += [(*rnd.choice(forks), *(rnd.randrange(2) for _ in range(rnd.randint(1, 40)))) for _ in range(4)]
        contexts = list({(*rnd.choice(forks), *(rnd.randrange(9) for _ in range(8))) for _ in range(30)})
        forks = [fork for fork in dict.fromkeys(forks) if len(fork) >= MIN_TOKENS]
        choices = [c for n in range(len(forks) + 1) for c in itertools.combinations(forks, n)]
        best = max(saved(contexts, choice) for choice in choices)
        assert saved(contexts, tuple(choose(contexts))) == best


def test_what_a_context_continues() -> None:
    beginnings = Beginnings([SYSTEM, EXAMPLES])
    [context] = questions(EXAMPLES, 1, 1000)
    assert beginnings.of(context, 3) == 1
    assert beginnings.of(EXAMPLES, 3) == 0  # one token is left to compute
    assert beginnings.of(SYSTEM, 3) is None
    assert beginnings.of(context, 3, longest=len(context) + 3) == 1
    assert beginnings.of(context, 3, longest=len(context) + 2) is None
    assert [beginnings.length(number) for number in (None, 0, 1)] == [0, 25, 325]
