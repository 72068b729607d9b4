"""Eval tasks by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.leaf import _first_line, _Leaf, _local, _raised
from optuna_merge.evaluation.term import EvalTask, _Goal


class _Loader:
    """Finds tasks by name: in the search path first, among lm-eval's own only if they are not there."""

    def __init__(self, search_path: Sequence[str | Path], allow_unsafe_code: bool) -> None:
        self._paths = [Path(path).expanduser() for path in search_path]
        for path in self._paths:
            if not path.is_dir():
                raise TaskError(f"task_search_path must name folders, got {path}, which is none; correct the path")
        self._allow_unsafe_code = allow_unsafe_code
        self._managers: dict[tuple[bool, str], TaskManager] = {}
        self._leaves: dict[str, _Leaf] = {}

    def load(self, task: EvalTask) -> _Goal:
        manager = self._manager_for(task)
        try:
            loaded = manager.load([task.name])
        except Exception as exc:
            built = _local(exc.__traceback__, "__init__", "self")
            if isinstance(exc, IndexError) and len(getattr(built, "task_docs", [None])) == 0:
                raise TaskError(f"task '{task.name}': no documents are left in its split; correct its data") from exc
            # lm-eval renders the first document when it loads a task
            doc_id = 0 if _local(exc.__traceback__, "__init__", "test_doc") is not None else None
            raise _raised(task.name, doc_id, "loading it", exc) from exc
        group = loaded.get("groups", {}).get(task.name)
        kind = "group" if group is not None else "task" if list(loaded["tasks"]) == [task.name] else "tag"
        if len(loaded["tasks"]) == 1 and kind == "tag" and task.name not in manager.all_tags:
            kind = "task"
        if not loaded["tasks"]:
            raise TaskError(f"task '{task.name}': the {kind} has no tasks in it; correct its file")
        leaves = [self._leaf(name, leaf) for name, leaf in loaded["tasks"].items()]
        return _Goal(task, kind, leaves, group if group is not None and group.has_aggregation else None)

    def _leaf(self, name: str, task: Task) -> _Leaf:
        if getattr(task, "UNSAFE_CODE", False) and not self._allow_unsafe_code:
            raise TaskError(
                f"task '{name}' runs code that the model generates; allow unsafe code for this study if you mean it"
            )
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"task '{name}' needs images or audio; only text can be scored")
        config = json.dumps(task.dump_config(), sort_keys=True, default=str)
        leaf = self._leaves.setdefault(name, _Leaf(name, task, config))
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
        # lm-eval skips files that it cannot read without a word
        for path in sorted(file for folder in self._paths for file in folder.glob("**/*.yaml")):
            try:
                load_yaml(path, resolve_func=False)
            except Exception as exc:
                message += f"; {path} could not be read: {_first_line(exc)}"
        return message
