"""The judge of a study: made from its study file, checked before the first merge, and what it may be asked at most.

Knows the study file; ``judging/`` knows how a judge is asked.
"""

from __future__ import annotations

from pathlib import Path

from optuna_merge.config.judge import BEST_SOURCE, JudgeConfig
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.evaluation.description import Description
from optuna_merge.judging.client import check_judge
from optuna_merge.judging.judge import Judge
from optuna_merge.judging.store import JUDGEMENTS_FILE, JudgeCost, Judgements
from optuna_merge.study.holdout_file import N_BEST

__all__ = ["JudgeCost", "check_study_judge", "judge_cost", "make_judge", "most_questions"]


def make_judge(config: StudyConfig) -> Judge | None:
    """The judge that the study file names, with what it has replied; None if it names none. Connects to nothing."""
    if config.judge is None:
        return None
    return Judge(_of_one_worker(config), Judgements(_file(config)))


def check_study_judge(config: StudyConfig) -> None:
    """Ask the judge for its models, if the study file names a judge.

    Raises:
        JudgeError: If the key is missing or refused, there is no such server, or it lacks the model.
    """
    if config.judge is not None:
        check_judge(config.judge)


def judge_cost(config: StudyConfig) -> JudgeCost | None:
    """What the study has asked its judge; None if it asked nothing.

    Raises:
        StudyError: If the file of judgements cannot be read.
    """
    return None if config.judge is None else Judgements(_file(config)).cost()


def most_questions(config: StudyConfig, tasks: Description, n_baselines: int) -> int:
    """The most questions that a study can ask, if no two answers are equal and no reply is nonsense.

    Args:
        config: The study file.
        tasks: What is scored.
        n_baselines: Baselines that are scored first.
    """
    if config.judge is None:
        return 0
    n_trials = config.study.n_trials
    n_held = min(n_trials, N_BEST + n_baselines)
    n_first = 0 if config.judge.against not in (None, BEST_SOURCE) else len(config.sources) * tasks.n_judged_first
    n_asked = n_first + n_trials * tasks.n_judged + n_held * tasks.n_judged_holdout
    return config.judge.n_judgements * n_asked


def _file(config: StudyConfig) -> Path:
    return config.storage_path / JUDGEMENTS_FILE


def _of_one_worker(config: StudyConfig) -> JudgeConfig:
    """The judge as one of the study's workers asks it: they share what the file allows."""
    judge, n_workers = config.judge, config.study.n_workers
    assert judge is not None
    rate = judge.requests_per_minute
    share = {
        "concurrency": max(1, judge.concurrency // n_workers),
        "requests_per_minute": None if rate is None else rate / n_workers,
    }
    return judge.model_copy(update=share)
