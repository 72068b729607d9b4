"""The figures of a study, read from its storage, and the sentences that follow from them. Loads no torch.

The models are the sources, the base, the uniform merges and the best merges. Each has its score on the searched
documents and, once ``study/holdout.py`` has scored it, on the holdout. The searched documents alone choose the best
merge: a choice by the holdout would bias its figure upward, as the maximum over many trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.report.race import RaceStanding, race_standing
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep, ascent_trial, steps_of
from optuna_merge.storage.trials import FINISHED, best_merges, front_of, score_of
from optuna_merge.study.holdout_file import Answers, HoldoutRow, read_holdout
from optuna_merge.study.judges import JudgeCost, judge_cost

Kind = Literal["source", "base", "uniform", "ascent", "runner-up", "best"]

_END = "end of the ascent"


@dataclass(frozen=True)
class SearchedTask:
    """One metric on the searched documents.

    ``stderr`` is None where lm-eval estimates none, ``answers`` where nothing is generated.
    """

    value: float
    stderr: float | None
    answers: Answers | None = None


@dataclass(frozen=True)
class Row:
    """One model of the report.

    Attributes:
        name: Name of the baseline, or the rank among the best merges.
        kind: What kind of model it is.
        trial: Number of the trial that scored it.
        value: Its score on the searched documents.
        tasks: Eval task to its metric on the searched documents.
        holdout: Its figures on the holdout; None before it is scored there.
    """

    name: str
    kind: Kind
    trial: int
    value: float
    tasks: dict[str, SearchedTask]
    holdout: HoldoutRow | None


@dataclass(frozen=True)
class Point:
    """A trial of the front: no other trial is better in one objective and at least as good in the rest.

    Attributes:
        name: Name of the baseline, or ``merge``.
        trial: Number of the trial.
        values: Objective to its value on the searched documents.
        value: Sum of the values.
    """

    name: str
    trial: int
    values: dict[str, float]
    value: float


@dataclass(frozen=True)
class Summary:
    """A study at a glance.

    Attributes:
        study: Name of the study.
        n_trials: Total number of trials that the latest run was asked for.
        states: Trial state to number of trials.
        rows: Sources, base, uniform merges, end of the ascent, runners-up and best merge, in this order.
        best_trial: Number of the best merge; None if no merge is scored yet.
        best_value: Its score on the searched documents.
        failures: Number of each failed trial to the reason.
        n_documents: Documents scored in all trials.
        seconds: Time spent on the ascent, and on merging and scoring in all trials.
        ascent: The steps of the ascent, if the study begins with it.
        front: With ``goal: pareto`` the front, from the best in the first objective on; else empty.
        judge: What the judge was asked; None if it was asked nothing.
        max_gen_toks: Tokens that answers could have at most when the holdout was scored; None: each task's own limit.
        race: The race of merge methods; None if there is one method.
    """

    study: str
    n_trials: int
    states: dict[str, int]
    rows: list[Row]
    best_trial: int | None
    best_value: float | None
    failures: dict[int, str]
    n_documents: int
    seconds: float
    ascent: list[AscentStep]
    front: list[Point]
    judge: JudgeCost | None = None
    max_gen_toks: int | None = None
    race: RaceStanding | None = None

    @property
    def n_finished(self) -> int:
        """Trials that are complete, pruned or failed."""
        return sum(self.states.get(state.name.lower(), 0) for state in FINISHED)

    @property
    def progress(self) -> str:
        """How far the study is, such as ``7 of 10 trials``."""
        return f"{self.n_finished} of {max(self.n_finished, self.n_trials)} trials"

    @property
    def state_counts(self) -> str:
        """The states in words, such as ``5 complete, 2 pruned``."""
        return ", ".join(f"{count} {state}" for state, count in sorted(self.states.items()))

    @property
    def judge_line(self) -> str:
        """What the judge was asked, in words; empty if it was asked nothing."""
        if self.judge is None:
            return ""
        cost = self.judge
        return f"judge: {cost.n_replies:,} replies, {cost.n_in:,} tokens in questions, {cost.n_out:,} in replies"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def summarize(study: optuna.Study, config: StudyConfig, n_best: int = 1, max_gen_toks: int | None = None) -> Summary:
    """Read the figures of a study, running or not.

    Args:
        study: The study.
        config: Its study file, for the order of the tasks and the folder with the figures on the holdout.
        n_best: Maximum number of best merges that get a row.
        max_gen_toks: Take the figures on the holdout that were scored with answers of up to so many tokens; None: those
            of the tasks' own limits.
    """
    trials = study.get_trials(deepcopy=False)
    merges = best_merges(study, n_best)
    best = merges[0] if merges else None
    return Summary(
        study=study.study_name,
        n_trials=study.user_attrs.get(attributes.WANTED, config.study.n_trials),
        states=dict(Counter(trial.state.name.lower() for trial in trials)),
        rows=_rows(trials, merges, read_holdout(config.storage_path, study, best, max_gen_toks), config),
        best_trial=None if best is None else best.number,
        best_value=None if best is None else score_of(best),
        failures={
            trial.number: trial.user_attrs.get(attributes.FAILURE, "no reason recorded")
            for trial in trials
            if trial.state == TrialState.FAIL
        },
        n_documents=sum(trial.user_attrs.get(attributes.DOCUMENTS, 0) for trial in trials),
        seconds=sum(
            trial.user_attrs.get(key, 0.0)
            for trial in trials
            for key in (attributes.ASCENT_SECONDS, attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
        ),
        ascent=steps_of(first) if (first := ascent_trial(trials)) else [],
        front=_front(study, config),
        judge=judge_cost(config),
        max_gen_toks=max_gen_toks,
        race=race_standing(trials),
    )


def standing(summary: Summary) -> str:
    """One sentence: the best merge so far, and what it beats or has to beat."""
    rivals = [row for row in summary.rows if row.kind in ("source", "uniform") and row.trial != summary.best_trial]
    if summary.best_value is None:
        return "No merge has been scored yet."
    text = f"Best merge: trial {summary.best_trial}, {summary.best_value:.4f} on the searched documents"
    if not rivals:
        return f"{text}."
    rival = max(rivals, key=lambda row: row.value)
    ahead = summary.best_value - rival.value
    return f"{text}, {abs(ahead):.4f} {'above' if ahead >= 0 else 'below'} {rival.name} ({rival.value:.4f})."


def ascent_line(summary: Summary) -> str:
    """What the ascent did and what it took; empty without one."""
    steps = summary.ascent
    if not steps:
        return ""
    third = max(1, len(steps) // 3)
    first, last = (sum(step.expected for step in part) / third for part in (steps[:third], steps[-third:]))
    return (
        f"ascent: {len(steps)} steps, {sum(step.n_documents for step in steps)} documents differentiated in"
        f" {sum(step.seconds for step in steps):.0f} s; expected score {first:.4f} in the first third, {last:.4f} in"
        " the last"
    )


def verdict(summary: Summary) -> str:
    """One sentence: the best merge on the holdout against the best source and the best uniform merge.

    All three are chosen by their scores on the searched documents.

    Returns:
        Empty if neither a source nor a uniform merge has been scored on the holdout.
    """
    parts = []
    for kind, title in (("source", "source"), ("uniform", "uniform merge")):
        rows = [row for row in summary.rows if row.kind == kind and row.holdout and row.trial != summary.best_trial]
        if rows:
            row = max(rows, key=lambda row: row.value)
            assert row.holdout is not None
            ahead, stderr, p_value = row.holdout.difference, row.holdout.difference_stderr, row.holdout.p_value
            how = "better" if ahead >= 0 else "worse"
            shown = f"p = {p_value:.4f}" if p_value >= 1e-4 else "p < 0.0001"
            parts.append(f"{abs(ahead):.4f} ± {stderr:.4f} {how} than the best {title} ({row.name}; {shown})")
    if not parts:
        return ""
    return (
        f"On the holdout the best merge, chosen on the searched documents, is {' and '.join(parts)}: two-sided"
        " permutation tests, paired by document."
    )


def _rows(
    trials: list[FrozenTrial], merges: list[FrozenTrial], holdout: dict[int, HoldoutRow], config: StudyConfig
) -> list[Row]:
    kinds: tuple[Kind, ...] = ("source", "base", "uniform")
    named: list[tuple[FrozenTrial, str, Kind]] = [
        (trial, trial.user_attrs[attributes.BASELINE], kind)
        for kind in kinds
        for trial in trials
        if trial.state == TrialState.COMPLETE and trial.user_attrs.get(attributes.BASELINE_KIND) == kind
    ]
    end, ranked = ascent_trial(trials), {trial.number for trial in merges}
    if end is not None and end.state == TrialState.COMPLETE and end.number not in ranked:
        named.append((end, _END, "ascent"))
    for rank, trial in reversed(list(enumerate(merges[1:], start=2))):
        named.append((trial, f"best merge, rank {rank}{_of_ascent(trial)}", "runner-up"))
    named += [(trial, f"best merge{_of_ascent(trial)}", "best") for trial in merges[:1]]
    order = [task.name for task in config.tasks]
    return [
        Row(name, kind, trial.number, _score(trial), _tasks(trial, order), holdout.get(trial.number))
        for trial, name, kind in named
    ]


def _of_ascent(trial: FrozenTrial) -> str:
    return f" ({_END})" if attributes.ASCENT in trial.user_attrs else ""


def _score(trial: FrozenTrial) -> float:
    score = score_of(trial)
    assert score is not None
    return score


def _tasks(trial: FrozenTrial, order: list[str]) -> dict[str, SearchedTask]:
    prefix = f"{attributes.SCORE} "
    scored = [key.removeprefix(prefix) for key in trial.user_attrs if key.startswith(prefix)]
    # A storage does not keep the order of attributes. A task with several terms is called "name (metric)".
    scored.sort(key=lambda task: (order.index(task.split(" (")[0]) if task.split(" (")[0] in order else 0, task))
    return {task: _task(trial.user_attrs, task) for task in scored}


def _task(recorded: Mapping[str, Any], task: str) -> SearchedTask:
    answers = recorded.get(f"{attributes.ANSWERS} {task}")
    return SearchedTask(
        recorded[f"{attributes.SCORE} {task}"],
        recorded.get(f"{attributes.STDERR} {task}"),
        None if answers is None else Answers(**answers),
    )


def _front(study: optuna.Study, config: StudyConfig) -> list[Point]:
    names = study.metric_names or config.objectives
    points = [
        Point(
            trial.user_attrs.get(attributes.BASELINE, "merge"),
            trial.number,
            dict(zip(names, trial.values, strict=True)),
            _score(trial),
        )
        for trial in front_of(study)
    ]
    return sorted(points, key=lambda point: ([-value for value in point.values.values()], point.trial))
