"""How generated answers came about, model by model, and where that may be what a difference in score comes from.

The figures are those of the holdout if the best merge was scored there, else those of the searched documents. Knows the
figures of the summary; does not know texts.
"""

from __future__ import annotations

from dataclasses import dataclass

from optuna_merge.report.summary import Row, Summary
from optuna_merge.report.tables import Table
from optuna_merge.study.holdout_file import Answers

_N_STDERRS = 2
"""Standard errors by which shares of two models must differ to be named."""

_SHARES = {
    "cut": "cut by max_gen_toks",
    "empty": "empty",
    "unread": "not readable by the task's filter",
}


@dataclass(frozen=True)
class _Figure:
    value: float
    answers: Answers


def answers_table(summary: Summary, first: str) -> Table | None:
    """Shares of answers that were cut, empty and unreadable, and their mean tokens, for each task and model.

    Args:
        summary: The figures of the study.
        first: Header of the column of tasks.

    Returns:
        None if nothing was generated.
    """
    figures = _figures(summary)
    rows: list[list[str]] = []
    best: int | None = None
    for task in dict.fromkeys(task for _, own in figures for task in own):
        for row, own in figures:
            if task not in own:
                continue
            if row.kind == "best" and best is None:
                best = len(rows)
            answers = own[task].answers
            unread = "" if answers.unread is None else f"{answers.unread:.1%}"
            shares = [f"{answers.cut:.1%}", f"{answers.empty:.1%}", unread]
            rows.append([task, row.name, str(row.trial), f"{answers.n_tokens:.1f}", *shares])
    header = [first, "model", "trial", "mean tokens", "cut", "empty", "not read"]
    return Table(header, rows, best) if rows else None


def answers_split(summary: Summary) -> str:
    """Which documents the figures of :func:`answers_table` are of: ``searched`` or ``holdout``."""
    return "holdout" if any(_is_held(row) for row in summary.rows if row.kind == "best") else "searched"


def length_warnings(summary: Summary) -> list[str]:
    """Sentences that name what may be behind a difference in a metric: more answers cut, empty or unreadable.

    The best merge is compared with the base, the best source and the best uniform merge. A share is named if it differs
    by two standard errors and, where the metric lies in [0, 1], by half as much as the metric: then answers that
    scored nothing may be most of the difference.
    """
    figures = _figures(summary)
    best = next((own for row, own in figures if row.kind == "best"), {})
    sentences = []
    for row, own in _rivals(figures):
        for task in (task for task in best if task in own):
            ours, theirs = best[task], own[task]
            parts = [
                f"{getattr(ours.answers, name):.1%} of its answers are {what} and {getattr(theirs.answers, name):.1%}"
                f" of those of {row.name}"
                for name, what in _SHARES.items()
                if _may_explain(ours, theirs, name)
            ]
            if parts:
                sentences.append(
                    f"{task}: the best merge is {ours.value - theirs.value:+.4f} from {row.name}, but"
                    f" {', '.join(parts)}: the difference may come from that. Score them again with report"
                    " --lengths N, or correct the filter."
                )
    return sentences


def _figures(summary: Summary) -> list[tuple[Row, dict[str, _Figure]]]:
    """Each model with its figures of the tasks that generate."""
    split = answers_split(summary)
    found = []
    for row in summary.rows:
        if split == "holdout":
            tasks = {} if row.holdout is None else row.holdout.tasks
            own = {name: _Figure(t.value, t.answers) for name, t in tasks.items() if t.answers is not None}
        else:
            own = {name: _Figure(t.value, t.answers) for name, t in row.tasks.items() if t.answers is not None}
        found.append((row, own))
    return found


def _is_held(row: Row) -> bool:
    return row.holdout is not None and any(task.answers is not None for task in row.holdout.tasks.values())


def _rivals(figures: list[tuple[Row, dict[str, _Figure]]]) -> list[tuple[Row, dict[str, _Figure]]]:
    best_trial = next((row.trial for row, _ in figures if row.kind == "best"), None)
    rivals = []
    for kind in ("base", "source", "uniform"):
        found = [(row, own) for row, own in figures if row.kind == kind and row.trial != best_trial and own]
        if found:
            rivals.append(max(found, key=lambda pair: pair[0].value))
    return rivals


def _may_explain(ours: _Figure, theirs: _Figure, name: str) -> bool:
    shares = [getattr(figure.answers, name) for figure in (ours, theirs)]
    is_count = all(figure.value == figure.answers.n_tokens for figure in (ours, theirs))
    if None in shares or ours.value == theirs.value or is_count:
        return False
    variance = sum(share * (1 - share) / figure.answers.n for share, figure in zip(shares, (ours, theirs), strict=True))
    apart = abs(shares[0] - shares[1])
    if apart == 0 or apart < _N_STDERRS * variance**0.5:
        return False
    is_share = all(0 <= figure.value <= 1 for figure in (ours, theirs))
    return not is_share or apart >= abs(ours.value - theirs.value) / 2
