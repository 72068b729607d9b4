"""How the race of a study's merge methods stands or went: its figures, a sentence and a picture.

Reads trials; does not know how they were planned. A method is shown by its best merge on the race's chunks, which all
of its merges were scored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from optuna_merge.report.pictures import Chart, Role, Series
from optuna_merge.search.race import Entrant, ranking, recorded_schedule, rounds_of
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import FINISHED

_ROLES: tuple[Role, ...] = ("best", "merge", "uniform", "source", "base")


@dataclass(frozen=True)
class RaceRow:
    """A method in the race.

    Attributes:
        method: The method.
        last_round: The last round that it was in; 0 are the uniform merges.
        n_merges: Its merges that were scored in the race.
        n_documents: Documents that were scored for them.
        trial: Number of the trial of its best merge; None if it has none yet.
        value: Mean score of that merge on the race's chunks; None without one.
        difference: That minus the leader's; None without a merge.
        stderr: Standard error of the difference, paired by chunk; None without a merge, and for the leader.
    """

    method: str
    last_round: int
    n_merges: int
    n_documents: int
    trial: int | None
    value: float | None
    difference: float | None
    stderr: float | None


@dataclass(frozen=True)
class RaceStanding:
    """A race.

    Attributes:
        rows: Its methods; those that stayed longer come first, among these the better ones.
        round: The round that it is in, 0 for the uniform merges; the last one if it is over.
        n_rounds: Rounds that it has at most.
        n_chunks: Chunks that each merge is scored on.
        winner: The method that won; None if it is not over.
    """

    rows: list[RaceRow]
    round: int
    n_rounds: int
    n_chunks: int
    winner: str | None

    @property
    def line(self) -> str:
        """The race in one sentence."""
        n_merges, n_documents = sum(row.n_merges for row in self.rows), sum(row.n_documents for row in self.rows)
        spent = f"{n_merges} merges on {self.n_chunks} chunks, {n_documents} documents"
        if self.winner is not None:
            return f"race: {self.winner} has won against {', '.join(row.method for row in self.rows[1:])}; {spent}"
        left = [row.method for row in self.rows if row.last_round == self.round]
        return f"race: round {self.round} of {self.n_rounds}, {', '.join(left)} are left; {spent}"


def race_standing(trials: Sequence[FrozenTrial]) -> RaceStanding | None:
    """The race of a study; None if it races no methods."""
    schedule = recorded_schedule(trials)
    if schedule is None:
        return None
    rounds = rounds_of(trials, schedule)
    winner = rounds[-1][0] if len(rounds[-1]) == 1 else None
    last = len(rounds) - (1 if winner is None else 2)
    ranked = ranking(trials, schedule.methods, schedule.n_chunks, last)
    leader = ranked[0] if winner is None else next(entrant for entrant in ranked if entrant.method == winner)
    rows = [
        _row(trials, entrant, leader, max(n for n, left in enumerate(rounds[: last + 1]) if entrant.method in left))
        for entrant in ranked
    ]
    rows.sort(key=lambda row: (row.method != winner, -row.last_round))
    return RaceStanding(rows, last, len(schedule.n_draws), schedule.n_chunks, winner)


def race_picture(trials: Sequence[FrozenTrial], standing: RaceStanding) -> Chart | None:
    """Each method's best score on the race's chunks by the documents that were scored for the method."""
    series = []
    for index, row in enumerate(standing.rows):
        xs, ys, spent = list[float](), list[float](), 0
        for trial in _of(trials, row.method):
            spent += _documents(trial, standing.n_chunks)
            entrant = ranking([trial], [row.method], standing.n_chunks, standing.round)[0]
            if entrant.chunks:
                xs.append(spent)
                ys.append(max([entrant.score, *ys[-1:]]))
        if xs:
            role = _ROLES[min(index, len(_ROLES) - 1)]
            series.append(Series(row.method, role, xs, ys, is_line=True, is_step=True))
    if not series:
        return None
    return Chart(
        "race",
        "The race: best merge of each method by documents spent on it",
        "documents scored for the method",
        f"score on the first {standing.n_chunks} chunks",
        series,
    )


def _row(trials: Sequence[FrozenTrial], entrant: Entrant, leader: Entrant, last_round: int) -> RaceRow:
    own = _of(trials, entrant.method)
    n_chunks = len(leader.chunks)
    stderr = None
    ahead = entrant.behind(leader) if entrant.chunks and leader.chunks else []
    if entrant is not leader and len(ahead) > 1:
        mean = math.fsum(ahead) / len(ahead)
        stderr = math.sqrt(math.fsum((one - mean) ** 2 for one in ahead) / (len(ahead) - 1) / len(ahead))
    return RaceRow(
        entrant.method,
        last_round,
        len(own),
        sum(_documents(trial, n_chunks) for trial in own),
        None if entrant.trial is None else entrant.trial.number,
        entrant.score if entrant.chunks else None,
        math.fsum(ahead) / len(ahead) if ahead else None,
        stderr,
    )


def _of(trials: Sequence[FrozenTrial], method: str) -> list[FrozenTrial]:
    """The finished trials of a method that belong to the race."""
    return [
        trial
        for trial in trials
        if trial.user_attrs.get(attributes.METHOD) == method
        and (attributes.RACE_CHUNKS in trial.user_attrs or attributes.RACE in trial.user_attrs)
        and trial.state in FINISHED
    ]


def _documents(trial: FrozenTrial, n_chunks: int) -> int:
    """The documents of a trial; of the first one, which was scored on all, the share of the race's chunks."""
    n_documents: int = trial.user_attrs.get(attributes.DOCUMENTS, 0)
    reached = len(trial.intermediate_values)
    return n_documents if reached <= n_chunks else round(n_documents * n_chunks / reached)
