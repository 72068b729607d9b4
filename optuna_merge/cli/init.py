"""``init``: writes a study file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from optuna_merge.cli import options, output
from optuna_merge.errors import OptunaMergeError, first_line

_SHOWN = (
    "file",
    "task_search_path",
    "n_trials",
    "storage_path",
    "seed",
    "device",
    "vllm",
    "trust_remote_code",
    "as_json",
)
_Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Study file to write.")]


@options.takes_study(shown=_SHOWN, file=_Out, default=Path("study.yaml"))
def init(
    given: options.StudyArguments,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Models to merge: folders, hub names or LoRA adapters."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Their common base; default: found. none: merge without one."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="LIST", help="Eval tasks to score, separated by commas.")
    ] = None,
    evolve: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Turn this mergekit-evolve file into a study file.")
    ] = None,
    card: Annotated[
        str | None, typer.Option("--card", metavar="SIZE", help="Memory of the GPU that the study will run on.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a study file that check passes, with the reason for each choice as a comment.

    It finds the common base in the models' cards and configurations or by their weights, and chooses method, layer
    groups, metrics, number of trials, dtype and engine by models, documents and memory. Options of run-study go into
    the file.

    Example: optuna-merge init models/math models/code --tasks my_math,my_code --task-search-path eval_tasks

    Where a mergekit-evolve command line exists, write init --from instead of mergekit-evolve.
    """
    from optuna_merge.atomic import write_atomically
    from optuna_merge.study.draft import describe_draft, draft_from_evolve, draft_study, draft_text
    from optuna_merge.study.memory import parse_size

    path, keys = given.file, _keys(given, evolve)
    _refuse_contradictions(path, models, base, tasks, evolve, overwrite=overwrite)
    for line in given.needless():
        output.note(line)
    memory = None if card is None else parse_size(card)
    if evolve is None:
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        draft, result = draft_study(path, models or [], base, names, keys, memory)
    else:
        draft, result = draft_from_evolve(path, evolve, keys, memory)
    line = shlex.join(["optuna-merge", "run-study", str(path), *given.remaining()])
    try:
        write_atomically(path, draft_text(draft, result, line, evolve))
    except OSError as exc:
        raise OptunaMergeError(f"{path}: --out must be a file that can be written, got {first_line(exc)}") from exc
    if given.as_json:
        output.print_json({"file": str(path), "run": line, "reasons": draft.reasons, "check": result.as_dict()})
    else:
        typer.echo(f"{path}: {describe_draft(draft, result)}")
        typer.echo(f"next: read its comments, then {line}")


def _keys(given: options.StudyArguments, evolve: Path | None) -> dict[str, Any]:
    """What the options of ``run-study`` decide: dotted key to value. Devices of several workers stay options."""
    from optuna_merge.config.read import load_study

    keys = given.plain_overrides()
    backend, n_workers = keys.get("engine.backend", "hf"), 1
    if evolve is not None:
        config = load_study(evolve, keys)
        backend, n_workers = config.engine.backend, config.study.n_workers
    keys |= given.engine_overrides(backend, n_workers)
    if given.device is None:
        keys.pop("engine.device", None)
    return keys


def _refuse_contradictions(
    path: Path, models: list[str] | None, base: str | None, tasks: str | None, evolve: Path | None, *, overwrite: bool
) -> None:
    if path.exists() and not overwrite:
        raise OptunaMergeError(
            f"{path}: --out must be a new file, got one that exists; name another or add --overwrite"
        )
    if not path.absolute().parent.is_dir():
        raise OptunaMergeError(f"{path}: --out must be in a folder that exists; make {path.absolute().parent} first")
    if evolve is None and not models:
        raise OptunaMergeError(
            "MODEL must name a model, got none; name fine-tunes, or a mergekit-evolve file with --from"
        )
    for name, value in (("MODEL", models and models[0]), ("--base", base), ("--tasks", tasks)):
        if evolve is not None and value:
            raise OptunaMergeError(f"{name} must be left out with --from, got {value}; change it in {evolve}")
