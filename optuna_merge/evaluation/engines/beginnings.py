"""What many prompts begin with: a system prompt, instructions, fixed examples.

Knows tokens only. A beginning is computed once for each load of weights (``prefixes.py``), and every prompt that begins
with it continues from there.

                        ┌─ q1     contexts  a b c q1, a b c q2, a b d e q3, a b d e q4
       a b ── c ────────┴─ q2     chosen    a b c, a b d e           the deepest that pay
           └─ d e ──────┬─ q3
                        └─ q4
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]

MIN_TOKENS = 16
"""Shorter beginnings are not worth the mask that their prompts then need."""


class Beginnings:
    """Beginnings, by number.

    Attributes:
        tokens: The tokens of each.
    """

    def __init__(self, tokens: Iterable[Tokens]) -> None:
        """Index them; equal ones are one."""
        self.tokens = tuple(dict.fromkeys(tokens))
        self._numbers = {beginning: number for number, beginning in enumerate(self.tokens)}
        self._lengths = sorted({len(beginning) for beginning in self.tokens}, reverse=True)

    def of(self, context: Tokens, n_more: int, longest: int | None = None) -> int | None:
        """Number of the longest beginning of a context that leaves at least one token of it.

        Args:
            context: The context.
            n_more: Tokens that follow it.
            longest: Tokens up to which a context and what follows may be continued; None: any number.
        """
        if longest is not None and len(context) + n_more > longest:
            return None
        found = (self._numbers.get(context[:n]) for n in self._lengths if n < len(context))
        return next((number for number in found if number is not None), None)

    def length(self, number: int | None) -> int:
        """Tokens of a beginning; 0 for none."""
        return 0 if number is None else len(self.tokens[number])


NO_BEGINNINGS = Beginnings(())


def choose_beginnings(contexts: Iterable[Tokens], *, pass_tokens: float, n_most_cached: int) -> Beginnings:
    """Choose the beginnings that save the most tokens.

    Args:
        contexts: The contexts of a study; equal ones count once, because they are computed once anyway.
        pass_tokens: Fixed cost of a forward pass, in tokens: a beginning must save more.
        n_most_cached: Tokens whose keys and values there is room for; the beginnings that save the most are kept.
    """
    kept: list[Tokens] = []
    n_left = n_most_cached
    for fork in sorted(_best(_forks(sorted(set(contexts)), pass_tokens), pass_tokens), key=lambda fork: -fork.n_saved):
        if len(fork.tokens) <= n_left:
            kept.append(fork.tokens)
            n_left -= len(fork.tokens)
    return Beginnings(kept)


@dataclass
class _Fork:
    """A beginning that contexts have in common before they go apart.

    Attributes:
        tokens: The beginning.
        is_context: Whether a context ends here.
        n_below: Contexts that go on from here.
        parent: The next shorter fork; None for the empty one.
        values: Tokens that the best choice at and below this fork saves, and whether it includes this fork, by the
            length of the longest chosen beginning above.
        n_saved: Tokens that this fork saves, once it is chosen.
    """

    tokens: Tokens
    is_context: bool = False
    n_below: int = 0
    parent: _Fork | None = None
    values: dict[int, tuple[float, bool]] = field(default_factory=dict)
    n_saved: float = 0.0

    def saved(self, n_above: int, pass_tokens: float) -> float:
        """What choosing this fork saves, if its contexts would otherwise continue ``n_above`` tokens."""
        return (len(self.tokens) - n_above) * self.n_below - len(self.tokens) - pass_tokens

    def above(self) -> list[int]:
        """Lengths of the forks above; 0 for none."""
        lengths, fork = [], self.parent
        while fork is not None:
            lengths.append(len(fork.tokens))
            fork = fork.parent
        return lengths


def _forks(contexts: Sequence[Tokens], pass_tokens: float) -> list[_Fork]:
    """The forks of sorted contexts that could pay, shorter ones first; the first is empty."""
    path, forks = [_Fork(())], []
    for number, context in enumerate([*contexts, ()]):
        common = context[: _n_common(context, contexts[number - 1])] if number else ()
        while len(path[-1].tokens) > len(common):
            fork = path.pop()
            if len(path[-1].tokens) < len(common):
                path.append(_Fork(common))
            path[-1].n_below += fork.n_below + fork.is_context
            fork.parent = path[-1]
            forks.append(fork)
        if context:
            path.append(_Fork(context, is_context=True))
    found = [fork for fork in forks if len(fork.tokens) >= MIN_TOKENS and fork.saved(0, pass_tokens) > 0]
    kept = {id(fork) for fork in [*path, *found]}
    for fork in found:
        while fork.parent is not None and id(fork.parent) not in kept:
            fork.parent = fork.parent.parent
    return sorted([*path, *found], key=lambda fork: len(fork.tokens))


def _best(forks: Sequence[_Fork], pass_tokens: float) -> list[_Fork]:
    """The forks that save the most tokens together, with what each saves."""
    children: dict[int, list[_Fork]] = {}
    for fork in forks[1:]:
        children.setdefault(id(fork.parent), []).append(fork)
    for fork in reversed(forks[1:]):
        below = children.get(id(fork), ())
        chosen = sum(child.values[len(fork.tokens)][0] for child in below)
        for n_above in fork.above():
            without = sum(child.values[n_above][0] for child in below)
            chosen_here = fork.saved(n_above, pass_tokens) + chosen
            fork.values[n_above] = max((without, False), (chosen_here, True))
    best: list[_Fork] = []
    pending = [(fork, 0) for fork in children.get(id(forks[0]), ())]
    while pending:
        fork, n_above = pending.pop()
        if fork.values[n_above][1]:
            fork.n_saved = fork.saved(n_above, pass_tokens)
            n_above = len(fork.tokens)
            best.append(fork)
        pending += [(child, n_above) for child in children.get(id(fork), ())]
    return best


def _n_common(first: Tokens, second: Tokens) -> int:
    n = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        n += 1
    return n
