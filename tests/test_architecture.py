"""Holds every file's imports to the arrows of the architecture, and the light files to their weight."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import optuna_merge
from optuna_merge import errors

PACKAGE = Path(optuna_merge.__file__).parent

# The rooms that each room imports from when it runs. A room is a folder of the package or a file at its top, and
# evaluation.engines is a room of its own. Every room may also import errors and atomic. A new arrow is a decision.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "atomic": set(),
    "checkpoints": {"recipe"},
    "cli": {"config", "data", "internals", "merging", "methods", "quickstart", "report", "storage", "study"},
    "config": {"methods", "recipe"},
    "data": set(),
    "duals": set(),
    "errors": set(),
    "evaluation": {"internals", "judging"},
    "evaluation.engines": {"evaluation", "internals"},
    "internals": set(),
    "judging": {"config"},
    "merging": {"checkpoints", "duals", "methods", "recipe"},
    "methods": {"duals"},
    "quickstart": set(),
    "recipe": set(),
    "report": {"config", "internals", "search", "storage", "study"},
    "search": {"config", "duals", "internals", "methods", "recipe", "storage"},
    "storage": {"internals"},
    "study": {
        "checkpoints",
        "config",
        "evaluation",
        "evaluation.engines",
        "internals",
        "judging",
        "merging",
        "recipe",
        "search",
        "storage",
    },
    "testing": {"evaluation", "methods"},
}

# Files that a study file, a name or a table can be looked at with, without waiting for torch.
LIGHT = [
    "optuna_merge",
    "optuna_merge.cli.app",
    "optuna_merge.config.read",
    "optuna_merge.evaluation.engine",
    "optuna_merge.merging.mergekit",
    "optuna_merge.methods",
    "optuna_merge.recipe",
    "optuna_merge.report.dashboard",
    "optuna_merge.report.summary",
    "optuna_merge.search.samplers",
    "optuna_merge.search.space",
    "optuna_merge.storage.open",
    "optuna_merge.testing",
]

# What those who build on the package import; these paths stay.
PUBLIC = {
    "optuna_merge": """
        MergeObjective OptunaMergeError Recipe RepeatableSampler StableCmaEsSampler StudyConfig Tracker
        load_study run_study
    """.split(),
    "optuna_merge.data": ["read_sample"],
    "optuna_merge.judging": ["Pairwise", "Rubric"],
    "optuna_merge.methods": ["METHODS", "MergeMethod", "find_method"],
    "optuna_merge.testing": [
        "EngineConformance",
        "FakeEngine",
        "MethodConformance",
        "merge_tensors",
        "write_tiny_models",
    ],
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str, *, with_types: bool = False) -> frozenset[str]:
    """Every module that a file imports anywhere, also late; those for type checkers alone only ``with_types``."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not with_types:
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


def ours(module: str, *, with_types: bool = False) -> set[str]:
    found = imports(module, with_types=with_types)
    names = {name.removeprefix("optuna_merge.") for name in found if name.startswith("optuna_merge.")}
    return names - {"errors", "atomic"}


def importers(library: str) -> set[str]:
    return {module for module in FILES if any(name.split(".")[0] == library for name in imports(module))}


def room(module: str) -> str:
    if module.startswith("evaluation.engines"):
        return "evaluation.engines"
    return module.partition(".")[0]


def drawn_arrows() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {room(module): set() for module in FILES}
    for module in FILES:
        arrows[room(module)] |= {room(other) for other in ours(module)} - {room(module)}
    return arrows


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Those that remain when whoever imports nothing that is left is taken away, again and again."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while lowest := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in lowest}
    return set(left)


def test_the_arrows() -> None:
    assert drawn_arrows() == ARROWS


def test_imports_run_down() -> None:
    assert circles(drawn_arrows()) == set()
    # the face of the package names what it hands on
    assert circles({module: ours(module, with_types=True) for module in FILES if module != "__init__"}) == set()


def test_the_documented_rooms_are_listed_from_the_top_down() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = text[text.index("| room |") : text.index("Public import paths")]
    listed = [
        name for cell in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)", cell)
    ]
    rooms = {name.partition(".")[0] for name in ARROWS} - {"__init__", "__main__"}
    assert sorted(listed) == sorted(rooms)
    for name, targets in ARROWS.items():
        for target in targets:
            if name in listed and target in listed and name != target:
                assert listed.index(name) < listed.index(target), f"{name} imports {target}, which is listed above it"


@pytest.mark.parametrize(("module", "names"), PUBLIC.items(), ids=list(PUBLIC))
def test_public_import_paths_stay(module: str, names: list[str]) -> None:
    for name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_methods_know_tensors_and_numbers_only() -> None:
    for module in FILES:
        if module.startswith("methods."):
            assert {name for name in ours(module) if not name.startswith("methods.")} <= {"duals"}, module
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
    """The objective with its ascent, and through it the holdout, alone know both Optuna and what handles tensors."""
    tensors = ("checkpoints.", "evaluation.", "merging.export", "merging.merger", "methods.")
    both = {
        module
        for module in importers("optuna")
        if not module.startswith("internals.") and any(name.startswith(tensors) for name in ours(module))
    }
    assert both == {"study.objective", "study.ascent", "study.holdout"}


def test_evaluation_knows_nothing_of_optuna() -> None:
    for module in FILES:
        if module.startswith("evaluation"):
            assert all(name.startswith(("evaluation.", "internals.", "judging.")) for name in ours(module)), module
            assert "internals.optuna" not in ours(module), module
            assert not any(name.split(".")[0] in ("optuna", "cmaes") for name in imports(module)), module


def test_only_the_engines_know_their_libraries() -> None:
    # checkpoints read tokenizers; quickstart trains models; testing makes tiny checkpoints.
    assert {room(module) for module in importers("transformers")} == {
        "checkpoints",
        "evaluation.engines",
        "quickstart",
        "testing",
    }
    assert {room(module) for module in importers("vllm")} <= {"evaluation.engines", "internals"}
    assert {room(module) for module in importers("lm_eval")} == {
        "data",
        "evaluation",
        "evaluation.engines",
        "internals",
    }
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


def test_what_is_imported_is_declared_and_what_is_declared_has_a_user() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = {"grpcio": "grpc", "pyyaml": "yaml"}

    def libraries(requirements: list[str]) -> set[str]:
        plain = [re.split(r"[\[<>=~! ;]", requirement)[0] for requirement in requirements]
        return {names.get(name, name.replace("-", "_")) for name in plain}

    always = libraries(project["dependencies"])
    extras = {library for values in project["optional-dependencies"].values() for library in libraries(values)}
    imported = {name.split(".")[0] for module in FILES for name in imports(module)}
    imported -= {"optuna_merge", *sys.stdlib_module_names}
    assert (
        imported - always - {"pytest"} <= {"grpc", "vllm", "wandb"} <= extras | {"grpc"}
    )  # grpcio is imported as grpc
    assert always - imported == {"scipy"}  # Optuna imports it late, for its GPSampler


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
