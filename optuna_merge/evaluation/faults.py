"""Errors of an eval task's own code, as errors of ours that name the task and the document."""

from __future__ import annotations

from optuna_merge.errors import JudgeError, OptunaMergeError, TaskError, first_line


def fault(task: str, doc_id: int | None, what: str, exc: Exception) -> OptunaMergeError:
    """The error to raise for what a task's code raised.

    Args:
        task: Name of the task.
        doc_id: The document it was at work on, if that is known.
        what: What raised, such as ``process_results``.
        exc: What it raised; an error of ours, also of a judge, is returned as it is.
    """
    if isinstance(exc, TaskError | JudgeError):
        return exc
    place = f"task '{task}'" if doc_id is None else f"task '{task}', document {doc_id}"
    kind = type(exc).__name__
    return TaskError(f"{place}: {what} raised {kind}: {first_line(exc)}; correct the task's file or data")
