"""Holds every file's imports to the arrows of the architecture, and the light files to their weight."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import optuna_merge
from optuna_merge import errors

PACKAGE = Path(optuna_merge.__file__).parent

# What each file imports of the package when it runs; every file may import errors. A new arrow is a decision: write
# it down here and in the picture of the architecture.
ARROWS = {
    "__init__": set(),
    "__main__": {"cli.app"},
    "adapter": {"files"},
    "check": {"config", "objective", "sampler", "sources", "space", "warm_start"},
    "checkpoint": {"adapter", "files", "layers", "recipe"},
    "config": {"methods", "recipe"},
    "dashboard": {"config", "pictures", "report", "storage", "store", "watcher"},
    "data": set(),
    "errors": set(),
    "evaluation": set(),
    "evaluation.batches": set(),
    "evaluation.engine": set(),
    "evaluation.hf": {
        "evaluation.batches",
        "evaluation.engine",
        "evaluation.hf_weights",
        "evaluation.language",
        "evaluation.quiet",
    },
    "evaluation.hf_weights": set(),
    "evaluation.language": {"evaluation.batches", "evaluation.engine", "evaluation.quiet"},
    "evaluation.next_tokens": {"evaluation.batches"},
    "evaluation.quiet": set(),
    "evaluation.tasks": {"evaluation.engine", "evaluation.quiet"},
    "evaluation.vllm": {
        "evaluation.engine",
        "evaluation.hf_weights",
        "evaluation.language",
        "evaluation.next_tokens",
        "evaluation.vllm_worker",
    },
    "evaluation.vllm_worker": set(),
    "explain": {"pictures", "sampler", "store"},
    "export": {"checkpoint", "merge", "mergekit", "recipe"},
    "files": set(),
    "holdout": {"evaluation.tasks", "objective", "report", "storage", "store"},
    "journal": set(),
    "hub": set(),
    "layers": {"recipe"},
    "lock": {"proxy", "storage"},
    "merge": {
        "checkpoint",
        "layers",
        "memory",
        "methods",
        "methods.function",
        "recipe",
        "sources",
        "staging",
        "vocabulary",
    },
    "memory": set(),
    "merge_source": {"checkpoint", "merge", "recipe"},
    "mergekit": {"layers", "methods", "methods.choice", "recipe"},
    "methods": set(),
    "objective": {
        "checkpoint",
        "config",
        "evaluation.engine",
        "evaluation.hf",
        "evaluation.tasks",
        "evaluation.vllm",
        "merge",
        "memory",
        "merge_source",
        "mergekit",
        "pruner",
        "recipe",
        "sampler",
        "sources",
        "space",
        "store",
        "vocabulary",
        "warm_start",
    },
    "owners": {"lock", "storage"},
    "pictures": {"config", "report", "sampler", "store"},
    "proxy": {"storage"},
    "pruner": set(),
    "recipe": set(),
    "report": {"config", "store"},
    "sampler": set(),
    "sources": {"checkpoint"},
    "space": {"config", "layers", "methods", "recipe"},
    "staging": {"memory"},
    "storage": set(),
    "store": {"journal", "lock", "proxy", "sampler", "storage"},
    "study": {
        "config",
        "lock",
        "objective",
        "owners",
        "report",
        "sampler",
        "storage",
        "store",
        "warm_start",
        "watcher",
    },
    "svg": {"pictures"},
    "trackers": {"config", "report", "sampler", "store", "watcher"},
    "vocabulary": {"checkpoint", "layers"},
    "warm_start": {"config", "space", "store"},
    "watcher": set(),
    "webpage": {"config", "dashboard", "pictures", "report", "svg"},
    "workers": set(),
    "testing": {"evaluation.engine", "methods", "methods.function"},
}

# Files that a study file, a name or a table can be looked at with, without waiting for torch.
LIGHT = [
    "optuna_merge",
    "optuna_merge.cli.app",
    "optuna_merge.config.sections",
    "optuna_merge.report.dashboard",
    "optuna_merge.evaluation.engine",
    "optuna_merge.checkpoints.tensor_names",
    "optuna_merge.merging.mergekit",
    "optuna_merge.methods",
    "optuna_merge.recipe",
    "optuna_merge.report.summary",
    "optuna_merge.search.samplers",
    "optuna_merge.search.space",
    "optuna_merge.storage.open",
    "optuna_merge.testing.conformance",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a file imports anywhere, also late, but not for type checkers alone."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} imports relatively"
                assert child.module is not None
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}".removeprefix("optuna_merge.")
                    found.add(f"optuna_merge.{inner}" if inner in FILES else child.module)
            walk(child)

    walk(ast.parse(FILES[module].read_text()))
    return frozenset(found)


def ours(module: str) -> set[str]:
    names = {name.removeprefix("optuna_merge.") for name in imports(module) if name.startswith("optuna_merge.")}
    return names - {"errors"}


def importers(library: str) -> set[str]:
    return {module for module in FILES if any(name.split(".")[0] == library for name in imports(module))}


def test_the_arrows() -> None:
    drawn = {module: ours(module) for module in FILES if not module.startswith(("cli", "methods."))}
    assert drawn == ARROWS


def test_methods_know_tensors_only() -> None:
    for module in FILES:
        if module.startswith("methods."):
            assert {name for name in ours(module) if not name.startswith("methods.")} == set(), module
            outside = {name.split(".")[0] for name in imports(module)} - {"optuna_merge"} - set(sys.stdlib_module_names)
            assert outside <= {"torch"}, module


def test_nothing_imports_the_command_line() -> None:
    for module in FILES:
        if module.partition(".")[0] not in ("cli", "__main__"):
            assert not any(name.partition(".")[0] == "cli" for name in ours(module)), module
    assert importers("typer") == {module for module in FILES if module.startswith("cli.") and module != "cli.progress"}
    assert importers("click") == set()  # typer carries its own


def test_a_command_imports_heavy_modules_late() -> None:
    """At the top of a command's file there are only typer and other commands; the rest is imported when it runs."""
    for module in FILES:
        if module.startswith("cli.") and module != "cli.progress":  # which is imported late itself
            tree = ast.parse(FILES[module].read_text())
            top = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module is not None]
            names = {str(node.module) for node in top if str(node.module).startswith("optuna_merge")}
            light = {"optuna_merge.cli", "optuna_merge.cli.options", "optuna_merge.cli.report", "optuna_merge.errors"}
            assert names <= light, module


def test_one_door_between_trials_and_tensors() -> None:
    """The objective, and through it the holdout, alone know both Optuna and what handles tensors."""
    tensors = {"merge", "checkpoint", "export"}
    both = {
        module
        for module in importers("optuna")
        if any(name in tensors or name.startswith(("evaluation.", "methods.")) for name in ours(module))
    }
    assert both == {"objective", "holdout"}


def test_evaluation_knows_nothing_of_optuna() -> None:
    for module in FILES:
        if module.startswith("evaluation"):
            assert all(name.startswith("evaluation.") for name in ours(module)), module
            assert not any(name.split(".")[0] in ("optuna", "cmaes") for name in imports(module)), module


def test_only_the_engines_know_their_libraries() -> None:
    # checkpoint and vocabulary read tokenizers; testing makes tiny checkpoints.
    users = {"checkpoint", "evaluation.hf_weights", "evaluation.language", "testing", "vocabulary"}
    assert importers("transformers") == users
    assert importers("vllm") == {"evaluation.vllm", "evaluation.vllm_worker"}
    assert {module for module in importers("lm_eval") if not module.startswith("evaluation.")} == {"data"}
    assert importers("mergekit") == set()


def test_light_files_load_no_heavy_library() -> None:
    code = f"""
import sys
import {", ".join(LIGHT)}
print(*sorted({{"torch", "transformers", "vllm", "lm_eval", "datasets", "pandas"}} & sys.modules.keys()))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout == "\n"
    assert result.stderr == ""


def test_the_package_itself_loads_no_library_at_all() -> None:
    code = "import sys, optuna_merge; print(*sorted({'torch', 'optuna', 'numpy', 'pydantic'} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout == "\n"


def test_public_names_are_sorted_and_lead_home() -> None:
    names = list(optuna_merge.__all__)
    assert names == sorted(set(names))
    for name in names:
        home = importlib.import_module(f"optuna_merge.{optuna_merge._HOMES[name]}")
        assert getattr(optuna_merge, name) is getattr(home, name)
    assert set(optuna_merge._HOMES) == set(names)
    with pytest.raises(AttributeError, match="module 'optuna_merge' has no attribute 'nonsense'"):
        _ = optuna_merge.nonsense


def test_the_tree_of_errors_is_the_one_in_its_docstring() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        head, marker, rest = line.partition("── ")
        if marker:
            drawn.append(((len(head) - 5) // 4 + 1, rest.split()[0]))
    assert drawn
    parents = {0: "OptunaMergeError"}
    tree = {}
    for depth, name in drawn:
        parents[depth] = name
        tree[name] = parents[depth - 1]
    classes = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and name != "OptunaMergeError"
    }
    assert tree == classes


def test_a_config_error_keeps_its_problems() -> None:
    error = errors.ConfigError(["a must be b", "c must be d"])
    assert error.problems == ("a must be b", "c must be d")
    assert str(error) == "a must be b\nc must be d"
    assert errors.ConfigError("one").problems == ("one",)
