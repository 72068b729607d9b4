"""Answers that a stronger model judges. A task's file declares how; the study file names the judge."""

from optuna_merge.judging.rubric import Pairwise, Rubric

__all__ = ["Pairwise", "Rubric"]
