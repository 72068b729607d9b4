"""The errors that optuna-merge raises on purpose.

    OptunaMergeError
    ├── ConfigError          a study file, with one line for each problem in it
    ├── RecipeError          a recipe that cannot be read or does not fit the models
    ├── CheckpointError      a model reference or a file of weights
    ├── MethodError          a merge method or one of its parameters
    ├── MergeError           merging one trial
    │   └── NonFiniteMergeError    NaN or infinity in the result; fails only that trial
    ├── TaskError            an eval task, its metrics or its documents
    ├── EngineError          the engine that scores
    │   └── EngineDiedError        the engine died twice in one trial; fails only that trial
    ├── StudyError           a study or its storage
    │   ├── StudyMismatchError     the storage holds a study with other inputs
    │   └── TrialTakenError        another process has taken over a trial
    ├── JudgeError           the judge of a study cannot be used; ends this run of the study
    │   ├── JudgementError         it gives no score to an answer; fails only that trial
    │   └── JudgeBudgetError       its budget is used up
    ├── WorkerError          worker processes
    ├── ExportError          writing a merged model or a recipe
    └── DataError            preparing the documents of an eval task

A message reads ``<where>: <name> must be <rule>, got <value>; <what to do>``. The command line prints it and exits
with 1; any other exception that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Sequence


class OptunaMergeError(Exception):
    """Base class of every error raised on purpose."""


class ConfigError(OptunaMergeError):
    """A study file that cannot be used.

    Attributes:
        problems: One line for each problem that was found.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeError(OptunaMergeError):
    """A recipe that cannot be read or does not fit the models."""


class CheckpointError(OptunaMergeError):
    """A model reference that leads nowhere, or weights that cannot be read."""


class MethodError(OptunaMergeError):
    """A merge method that is unknown, or a parameter outside its range.

    Attributes:
        fix: What to do about it, the end of the message; empty if the message does not say it separately.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        self.fix = fix
        super().__init__(f"{message}; {fix}" if fix else message)


class MergeError(OptunaMergeError):
    """A merge that could not be carried out."""


class NonFiniteMergeError(MergeError):
    """A merged tensor holds NaN or infinity; the trial fails, the study continues."""


class TaskError(OptunaMergeError):
    """An eval task that cannot be loaded, built or scored."""


class EngineError(OptunaMergeError):
    """The engine could not load weights or answer requests."""


class EngineDiedError(EngineError):
    """The engine died twice in one trial; the trial fails, the study continues."""


class StudyError(OptunaMergeError):
    """A study or its storage cannot be used."""


class StudyMismatchError(StudyError):
    """The storage holds a study whose scores are not comparable with those of this study file."""


class TrialTakenError(StudyError):
    """Another process has taken over a trial that this one was running."""


class JudgeError(OptunaMergeError):
    """The judge of a study cannot be used; the trial is put back, and the study can go on later."""


class JudgementError(JudgeError):
    """The judge gives no score to an answer; the trial fails, the study continues."""


class JudgeBudgetError(JudgeError):
    """The judge has been asked as often as the study allows."""


class WorkerError(OptunaMergeError):
    """No worker process is left."""


class ExportError(OptunaMergeError):
    """A merged model or a recipe could not be written."""


class DataError(OptunaMergeError):
    """The documents of an eval task could not be prepared."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error of torch or Python says that a device or the host is out of memory."""
    texts = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
    return isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and any(text in str(exc) for text in texts))


def first_line(exc: BaseException) -> str:
    """The first line of an exception's text, or the name of its type if it has none."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
