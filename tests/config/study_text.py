"""The smallest study file, and one with two objectives."""

from __future__ import annotations

STUDY = """\
genome:
  models: [a, b]
  merge_method: task_arithmetic
  base_model: base
tasks:
  - name: letters
"""  # what a test adds begins in line 7

TWO_TASKS = STUDY + "  - {name: other, objective: style}\n"
