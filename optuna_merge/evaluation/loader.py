"""Eval tasks by name, from the study's folders and from lm-eval's own.

Knows where task files lie and what an unknown or broken one is told. It does not know what a task is scored for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from optuna_merge.errors import TaskError, first_line
from optuna_merge.evaluation.faults import fault
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.term import EvalTask, Term
from optuna_merge.internals.lm_eval import is_multimodal, read_task_file, runs_generated_code, watch_loading


def task_names(search_path: Sequence[str | Path]) -> list[str]:
    """Names of the tasks, groups and tags in some folders, in alphabetical order, without lm-eval's own."""
    folders = [str(Path(path).expanduser()) for path in search_path]
    return sorted(TaskManager(include_path=folders, include_defaults=False).all_tasks) if folders else []


class Loader:
    """Finds tasks by name: in the search path first, among lm-eval's own only if they are not there."""

    def __init__(self, search_path: Sequence[str | Path], allow_unsafe_code: bool) -> None:
        """Look for the folders.

        Args:
            search_path: Folders with task files.
            allow_unsafe_code: Whether to load tasks that execute what the model generates.

        Raises:
            TaskError: If a folder does not exist.
        """
        self._paths = [Path(path).expanduser() for path in search_path]
        for path in self._paths:
            if not path.is_dir():
                raise TaskError(f"task_search_path must name folders, got {path}, which is none; correct the path")
        self._allow_unsafe_code = allow_unsafe_code
        self._managers: dict[tuple[bool, str], TaskManager] = {}
        self._leaves: dict[str, Leaf] = {}

    def load(self, task: EvalTask) -> Term:
        """Load one term of the score; a leaf that several terms name is loaded once.

        Raises:
            TaskError: If there is no such task, or it cannot be used.
        """
        manager = self._manager_for(task)
        loaded = _load(manager, task.name)
        group = loaded.get("groups", {}).get(task.name)
        kind = "group" if group is not None else "task" if list(loaded["tasks"]) == [task.name] else "tag"
        if len(loaded["tasks"]) == 1 and kind == "tag" and task.name not in manager.all_tags:
            kind = "task"  # named by its file
        if not loaded["tasks"]:
            raise TaskError(f"task '{task.name}': the {kind} has no tasks in it; correct its file")
        leaves = [self._leaf(name, leaf) for name, leaf in loaded["tasks"].items()]
        return Term(task, kind, leaves, group if group is not None and group.has_aggregation else None)

    def _leaf(self, name: str, task: Task) -> Leaf:
        if runs_generated_code(task) and not self._allow_unsafe_code:
            raise TaskError(
                f"task '{name}' runs code that the model generates; allow unsafe code for this study if you mean it"
            )
        if is_multimodal(task):
            raise TaskError(f"task '{name}' needs images or audio; only text can be scored")
        config = json.dumps(task.dump_config(), sort_keys=True, default=str)
        leaf = self._leaves.setdefault(name, Leaf(name, task, config))
        if leaf.config != config:
            raise TaskError(f"task '{name}' is used twice with different settings; give one of them another name")
        return leaf

    def _manager_for(self, task: EvalTask) -> TaskManager:
        for include_defaults in (False, True):
            manager = self._manager(include_defaults, task.metadata)
            if task.name in manager.task_index or Path(task.name).expanduser().is_file():
                return manager
        raise TaskError(self._unknown(task.name, manager.all_tasks))

    def _manager(self, include_defaults: bool, metadata: Mapping[str, Any] | None) -> TaskManager:
        key = (include_defaults, json.dumps(metadata, sort_keys=True, default=str))
        if key not in self._managers:
            self._managers[key] = TaskManager(
                include_path=list(self._paths), include_defaults=include_defaults, metadata=dict(metadata or {})
            )
        return self._managers[key]

    def _unknown(self, name: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "name its folder in task_search_path"
        places = [*(str(path.resolve()) for path in self._paths), "lm-eval's own tasks"]
        message = f"unknown task '{name}'; {hint} (looked in {', '.join(places)})"
        for path in sorted(file for folder in self._paths for file in folder.glob("**/*.yaml")):
            try:
                read_task_file(path)
            except Exception as exc:
                message += f"; {path} could not be read: {first_line(exc)}"
        return message


def _load(manager: TaskManager, name: str) -> Mapping[str, Any]:
    """What lm-eval loads under a name: ``tasks`` and ``groups``, each by name."""
    with watch_loading() as loading:
        try:
            return dict(manager.load([name]))
        except Exception as exc:
            if isinstance(exc, IndexError) and loading.has_no_documents:
                raise TaskError(f"task '{name}': no documents are left in its split; correct its data") from exc
            # lm-eval renders the first document when it loads a task
            raise fault(name, 0 if loading.reached_documents else None, "loading it", exc) from exc
