"""Answers that a stronger model judges. A task's file declares a :class:`Rubric`; the study file names the judge."""

from optuna_merge.judging.rubric import Rubric

__all__ = ["Rubric"]
