"""A race of merge methods: which trials it plans, and which method wins.

    a uniform merge, sources, base | uniform merges of all methods | draws | draws of the better half | ... | the winner

Every trial of a race is scored on the same first chunks, so methods are compared on the same documents. What is planned
next follows from the trials alone, so any process can plan it. Knows search spaces and trials; knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.search.pruner import signed_rank_p
from optuna_merge.search.space import Baseline, ModelRefs, SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import end_of_ascent
from optuna_merge.storage.claims import Planned

Spaces = Mapping[str, SearchSpace]
"""The search space of each method, in the order of the study file."""

_SHARE_OF_TRIALS = 1 / 3
"""The trials of a race are at most this share of the study's."""
_SHARE_OF_DOCUMENTS = 1 / 4
"""The documents that a race scores are at most this share of those of as many full trials as the study has."""
_SHARE_OF_CHUNKS, _LEAST_CHUNKS = 1 / 4, 4
_LEAST_DRAWS = 2
"""Each method that is in a round draws at least this many merges in it."""
_P_THRESHOLD = 0.05
"""A method of the better half is dropped, too, if it is worse than the leader at this level of significance."""


def make_spaces(config: StudyConfig, models: ModelRefs) -> dict[str, SearchSpace]:
    """The search space of each method of a study file; if there are several, names begin with the method.

    Args:
        config: The study file.
        models: Its checkpoints.
    """
    names = config.method_names
    if len(names) == 1:
        return {names[0]: SearchSpace(config, models)}
    return {name: SearchSpace(config.of_method(name), models, prefix=name) for name in names}


def space_of(trial: FrozenTrial, spaces: Spaces) -> SearchSpace:
    """The search space that a trial's parameters belong to; any one for a source or the base by itself."""
    return spaces[trial.user_attrs.get(attributes.METHOD, next(iter(spaces)))]


@dataclass(frozen=True)
class RaceSchedule:
    """How a race goes.

    Attributes:
        methods: The methods, in the order of the study file.
        n_uniform: Number of uniform merges of all methods.
        n_chunks: The first chunks, on which each trial of the race is scored.
        n_draws: For each round the number of merges that each method in it draws.
    """

    methods: tuple[str, ...]
    n_uniform: int
    n_chunks: int
    n_draws: tuple[int, ...]

    @classmethod
    def make(cls, spaces: Spaces, n_trials: int, documents: Sequence[int], where: str = "study file") -> RaceSchedule:
        """Plan a race: half of the methods is dropped in each round, and each round draws about as many merges.

        Args:
            spaces: At least two methods.
            n_trials: Trials of the study.
            documents: Number of documents in each chunk.
            where: What an error names as its place.

        Raises:
            StudyError: If the study has too few trials.

        References:
            Successive halving, arXiv:1502.07943. Departure: its budget is a number of merges, because a method's best
            merge is found among several.
        """
        n_chunks = min(len(documents), max(_LEAST_CHUNKS, math.ceil(len(documents) * _SHARE_OF_CHUNKS)))
        rounds = list(_halves(len(spaces)))
        n_uniform = len(_uniform_merges(spaces))
        share = sum(documents[:n_chunks]) / sum(documents)
        least = n_uniform + sum(rounds) * _LEAST_DRAWS
        wanted = math.ceil(least * max(1 / _SHARE_OF_TRIALS, share / _SHARE_OF_DOCUMENTS))
        if n_trials < wanted:
            raise StudyError(
                f"{where}: study.n_trials must be at least {wanted} for a race of {len(spaces)} methods, got"
                f" {n_trials}; it takes at least {least} merges on {n_chunks} of {len(documents)} chunks, a third of"
                " all trials and a quarter of all documents: raise it or name fewer methods"
            )
        most = math.floor(n_trials * min(_SHARE_OF_TRIALS, _SHARE_OF_DOCUMENTS / share))
        left, n_draws = most - n_uniform, list[int]()
        for index, n_methods in enumerate(rounds):
            n_draws.append(max(_LEAST_DRAWS, left // (len(rounds) - index) // n_methods))
            left -= n_draws[-1] * n_methods
        return cls(tuple(spaces), n_uniform, n_chunks, tuple(n_draws))

    def describe(self, spaces: Spaces, documents: Sequence[int], *, ascends: bool) -> str:
        """The race in one sentence.

        Args:
            spaces: Its methods.
            documents: Number of documents in each chunk.
            ascends: Whether the winner's search begins with an ascent.
        """
        methods = ", ".join(f"{name} ({len(space.distributions)} weights)" for name, space in spaces.items())
        in_rounds = list(_halves(len(self.methods)))
        rounds = ", then ".join(
            f"{n_draws} of each of {n_methods} methods"
            for n_methods, n_draws in zip(in_rounds, self.n_draws, strict=True)
        )
        n_merges = self.n_uniform + sum(map(int.__mul__, in_rounds, self.n_draws))
        cost = n_merges * sum(documents[: self.n_chunks]) / sum(documents)
        return (
            f"a race of {methods}: {self.n_uniform} uniform merges and draws, {rounds}; {n_merges}"
            f" merges on the first {self.n_chunks} of {len(documents)} chunks, as many documents as {cost:.1f} full"
            f" trials; then the winner alone{', which begins with an ascent' if ascends else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which :func:`recorded_schedule` makes an equal schedule."""
        return asdict(self)


def recorded_schedule(trials: Sequence[FrozenTrial]) -> RaceSchedule | None:
    """The schedule of a study's race; None if it races no methods, or has not begun."""
    recorded = trials[0].user_attrs.get(attributes.RACE) if trials else None
    if recorded is None:
        return None
    return RaceSchedule(
        tuple(recorded["methods"]), recorded["n_uniform"], recorded["n_chunks"], tuple(recorded["n_draws"])
    )


@dataclass(frozen=True)
class Entrant:
    """A method with its best merge so far, by the mean score of the race's chunks.

    Attributes:
        method: The method.
        trial: The trial of the merge; None if the method has none that was scored.
        chunks: Scores of the race's chunks; empty without a trial.
    """

    method: str
    trial: FrozenTrial | None
    chunks: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean score of the race's chunks; minus infinity without a trial."""
        return math.fsum(self.chunks) / len(self.chunks) if self.chunks else -math.inf

    def behind(self, leader: Entrant) -> list[float]:
        """What the score of each chunk is above that of the leader."""
        return [own - others for own, others in zip(self.chunks, leader.chunks, strict=True)]


def ranking(trials: Sequence[FrozenTrial], methods: Sequence[str], n_chunks: int, last_round: int) -> list[Entrant]:
    """The methods with their best merges, the best first.

    Args:
        trials: Trials of the study.
        methods: The methods to rank; those that are equal stay in this order.
        n_chunks: Chunks of the race.
        last_round: Later trials are left out.
    """
    return sorted(
        (_entrant(trials, method, n_chunks, last_round) for method in methods), key=lambda entrant: -entrant.score
    )


def survivors(trials: Sequence[FrozenTrial], methods: Sequence[str], n_chunks: int, last_round: int) -> list[str]:
    """The methods that stay after a round, in the given order.

    These are the better half, without those that are significantly worse than the leader (signed-rank test).
    """
    ranked = ranking(trials, methods, n_chunks, last_round)
    leader = ranked[0]
    kept = {
        entrant.method
        for entrant in ranked[: math.ceil(len(ranked) / 2)]
        if entrant is leader or (entrant.chunks and signed_rank_p(entrant.behind(leader)) >= _P_THRESHOLD)
    }
    return [method for method in methods if method in kept]


def rounds_of(trials: Sequence[FrozenTrial], schedule: RaceSchedule) -> list[list[str]]:
    """The methods in each round that has begun, from the uniform merges on.

    If the last one has a single method, that is the winner, and the round is the search that follows.
    """
    found = [list(schedule.methods)]
    while len(found[-1]) > 1:
        number = len(found) - 1
        own = [trial for trial in trials if trial.user_attrs.get(attributes.RACE_ROUND) == number]
        n_wanted = len(found[-1]) * schedule.n_draws[number - 1] if number else schedule.n_uniform
        if len(own) < n_wanted or not all(trial.state.is_finished() for trial in own):
            break
        found.append(survivors(trials, found[-1], schedule.n_chunks, number) if number else found[-1])
    return found


def winner_of(trials: Sequence[FrozenTrial]) -> str | None:
    """The method that has won a study's race; None if it races none, or the race is not over."""
    for trial in trials:
        attrs = trial.user_attrs
        if attributes.METHOD in attrs and attributes.RACE_CHUNKS not in attrs and attributes.RACE not in attrs:
            method: str = attrs[attributes.METHOD]
            return method
    return None


def trials_of_winner(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of the method that has won; none as long as none has; all trials if the study races no methods."""
    if recorded_schedule(trials) is None:
        return list(trials)
    winner = winner_of(trials)
    return [trial for trial in trials if winner is not None and trial.user_attrs.get(attributes.METHOD) == winner]


def without_race_after_ascent(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials without those of a race, if an ascent has followed the race: these lie elsewhere."""
    if end_of_ascent(trials) is None:
        return list(trials)
    return [trial for trial in trials if attributes.RACE_ROUND not in trial.user_attrs]


def best_of_race(trials: Sequence[FrozenTrial], method: str) -> list[dict[str, float]]:
    """Parameters of a method's best merge of the race; nothing without a race or if no merge was scored."""
    schedule = recorded_schedule(trials)
    best = None if schedule is None else _entrant(trials, method, schedule.n_chunks, len(schedule.n_draws)).trial
    return [] if best is None else [best.params]


class Race:
    """Plans the trials of a study that races methods.

    Args:
        spaces: At least two methods.
        ascends: Whether the winner's search begins with an ascent, if the winner has a parameter that can follow it.
    """

    def __init__(self, spaces: Spaces, *, ascends: bool = False) -> None:
        self._spaces = spaces
        self._ascends = ascends

    def first(self, schedule: RaceSchedule) -> Planned:
        """The first trial: a uniform merge on all documents, with which the others are compared."""
        method, baseline = _uniform_merges(self._spaces)[0]
        planned = _uniform(method, baseline, 0)
        return Planned(planned.params, {**planned.user_attrs, attributes.RACE: schedule.as_dict()})

    def plan(self, trials: Sequence[FrozenTrial]) -> list[Planned]:
        """What to do when no trial waits: the trials to enqueue; none: wait until running trials have ended."""
        schedule = recorded_schedule(trials)
        if schedule is None or not trials[0].state.is_finished():
            return []
        rounds = rounds_of(trials, schedule)
        methods, number = rounds[-1], len(rounds) - 1
        own = [trial for trial in trials if trial.user_attrs.get(attributes.RACE_ROUND) == number]
        if len(methods) > 1:
            return self._round(methods, number, schedule)[len(own) :]
        earlier = [trial for trial in trials if trial.user_attrs.get(attributes.RACE_ROUND, number) < number]
        finals = self._finals(methods[0], number, earlier, schedule)
        return finals[len(own) :] or [Planned(None, {attributes.METHOD: methods[0]})]

    def _round(self, methods: Sequence[str], number: int, schedule: RaceSchedule) -> list[Planned]:
        limit = {attributes.RACE_CHUNKS: schedule.n_chunks}
        if number == 0:
            merges = [_uniform(method, baseline, number) for method, baseline in _uniform_merges(self._spaces)]
            return merges[:1] + [Planned(one.params, {**one.user_attrs, **limit}) for one in merges[1:]]
        labels = {attributes.RACE_ROUND: number, **limit}
        n_draws = schedule.n_draws[number - 1]
        return [Planned(None, {attributes.METHOD: method, **labels}) for _ in range(n_draws) for method in methods]

    def _finals(
        self, winner: str, number: int, earlier: Sequence[FrozenTrial], schedule: RaceSchedule
    ) -> list[Planned]:
        """The winner's ascent, uniform merges and best merge, on all documents unless they were scored on all."""
        complete = [trial.params for trial in earlier if trial.state == TrialState.COMPLETE]
        planned = [
            Planned({}, {attributes.ASCENT: True, attributes.METHOD: winner, attributes.RACE_ROUND: number})
            for _ in range(self._ascends and bool(self._spaces[winner].smooth))
        ]
        planned += [
            _uniform(winner, baseline, number)
            for method, baseline in _uniform_merges(self._spaces)
            if method == winner and dict(baseline.params) not in complete
        ]
        best = _entrant(earlier, winner, schedule.n_chunks, number).trial
        if best is not None and best.params not in [*complete, *(dict(one.params or {}) for one in planned)]:
            planned.append(Planned(best.params, {attributes.METHOD: winner, attributes.RACE_ROUND: number}))
        return planned


def _halves(n: int) -> Iterator[int]:
    while n > 1:
        yield n
        n = math.ceil(n / 2)


def _uniform_merges(spaces: Spaces) -> list[tuple[str, Baseline]]:
    return [
        (method, baseline)
        for method, space in spaces.items()
        for baseline in space.baselines
        if baseline.kind == "uniform"
    ]


def _uniform(method: str, baseline: Baseline, number: int) -> Planned:
    labels = {attributes.BASELINE: baseline.name, attributes.BASELINE_KIND: baseline.kind}
    return Planned(baseline.params, {**labels, attributes.METHOD: method, attributes.RACE_ROUND: number})


def _entrant(trials: Sequence[FrozenTrial], method: str, n_chunks: int, last_round: int) -> Entrant:
    best = Entrant(method, None, ())
    for trial in trials:
        attrs, values = trial.user_attrs, trial.intermediate_values
        is_own = attrs.get(attributes.METHOD) == method and attrs.get(attributes.RACE_ROUND, math.inf) <= last_round
        if not is_own or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        if any(not math.isfinite(values.get(chunk, math.nan)) for chunk in range(n_chunks)):
            continue
        found = Entrant(method, trial, tuple(values[chunk] for chunk in range(n_chunks)))
        best = found if found.score > best.score else best
    return best
