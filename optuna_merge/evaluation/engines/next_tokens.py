"""Log-probabilities of continuations as questions for the next token, for an engine that remembers prefixes.

Knows tokens only; no tokenizer, no tensors and no model.

    context  a b c ── d e      questions   a b c    ->  d, f
                  └── f g                  a b c d  ->  e
                                           a b c f  ->  g

Choices of one token are asked in one question. An engine with a prefix cache computes only the part of a longer prefix
that comes after its last cached block. If that would still cost more than computing the sequence whole, as for long
texts, the whole sequence is asked for, with the log-probabilities of its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna_merge.evaluation.engines.batches import Item

MAX_TOKENS = 128
"""Tokens that one question may name; vLLM's limit."""


@dataclass(frozen=True)
class NextTokens:
    """One question: what comes after a prompt?

    Attributes:
        prompt: The tokens before; not empty.
        tokens: Different tokens whose log-probabilities are wanted, in ascending order; at most ``MAX_TOKENS``.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A sequence that is computed in one go: the log-probabilities of its prompt and of the token after it.

    Attributes:
        tokens: Context and continuation; at least two of the latter.
        n_context: Where the continuation begins; at least 1.
    """

    tokens: tuple[int, ...]
    n_context: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """All but the last token, which is scored without being an input."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Plan:
    """What to ask, and which answers belong to which item.

    Attributes:
        questions: In an order in which a prefix comes before what extends it.
        wholes: Sequences to compute in one go.
        steps: For each item, the question and the token for each token of its continuation; None: see ``whole_of``.
        whole_of: Index of an item to the index of its whole sequence.
        n_tokens: Approximate number of computed tokens: what contexts have in common is counted for each.
    """

    questions: list[NextTokens]
    wholes: list[Whole]
    steps: list[list[tuple[int, int]] | None]
    whole_of: Mapping[int, int]
    n_tokens: int

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Prompts of the questions, then of the whole sequences."""
        return [question.prompt for question in self.questions] + [whole.prompt for whole in self.wholes]


def make_plan(items: Sequence[Item], *, block_size: int) -> Plan:
    """Decide what to ask.

    Args:
        items: In any order; equal ones are computed once.
        block_size: Tokens in a block of the engine's prefix cache, at least 1.
    """
    questions: list[NextTokens] = []
    wholes: dict[Whole, int] = {}
    steps: list[list[tuple[int, int]] | None] = [None] * len(items)
    whole_of: dict[int, int] = {}
    n_tokens = 0
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.context, []).append(index)
    for context, indices in groups.items():
        wanted: dict[tuple[int, ...], set[int]] = {}
        for index in indices:
            continuation = items[index].continuation
            for n, token in enumerate(continuation):
                wanted.setdefault(context + continuation[:n], set()).add(token)
        sequences = {index: Whole(context + items[index].continuation, len(context)) for index in indices}
        asked = _asked(wanted, context, block_size)
        computed = sum(len(whole.prompt) for whole in set(sequences.values()))
        n_tokens += min(asked, computed)
        if asked > computed:
            whole_of |= {index: wholes.setdefault(whole, len(wholes)) for index, whole in sequences.items()}
            continue
        question_of = _ask(questions, wanted)
        for index in indices:
            continuation = items[index].continuation
            steps[index] = [
                (question_of[context + continuation[:n], token], token) for n, token in enumerate(continuation)
            ]
    return Plan(questions, list(wholes), steps, whole_of, n_tokens)


def _asked(wanted: Mapping[tuple[int, ...], set[int]], context: tuple[int, ...], block_size: int) -> int:
    """Tokens that are computed for the questions of one context, if full blocks are cached."""
    longer = sum(len(prefix) - _n_cached(prefix, block_size) for prefix in wanted if prefix != context)
    repeated = sum((_n_questions(tokens) - 1) * block_size for tokens in wanted.values())
    return len(context) + longer + repeated


def _n_cached(prefix: tuple[int, ...], block_size: int) -> int:
    # the last token is always computed
    return (len(prefix) - 1) // block_size * block_size


def _n_questions(tokens: set[int]) -> int:
    return -(-len(tokens) // MAX_TOKENS)


def _ask(
    questions: list[NextTokens], wanted: Mapping[tuple[int, ...], set[int]]
) -> dict[tuple[tuple[int, ...], int], int]:
    """Add questions; return the index of the question for each prefix and token."""
    question_of: dict[tuple[tuple[int, ...], int], int] = {}
    for prefix in sorted(wanted, key=len):
        tokens = sorted(wanted[prefix])
        for start in range(0, len(tokens), MAX_TOKENS):
            part = tuple(tokens[start : start + MAX_TOKENS])
            question_of |= {(prefix, token): len(questions) for token in part}
            questions.append(NextTokens(prefix, part))
    return question_of
