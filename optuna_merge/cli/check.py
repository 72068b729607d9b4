"""``check``: what a study file would do, and everything that is wrong with it. Loads no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from optuna_merge.cli.options import Json, StudyFile, TaskSearchPath, overrides_of, print_json

if TYPE_CHECKING:
    from optuna_merge.check import Check


def check(file: StudyFile, task_search_path: TaskSearchPath = None, as_json: Json = False) -> None:
    """Check a study file against its models and eval tasks, in seconds, without loading weights.

    It checks, and prints: the study file; the number of dimensions and the population; names, shapes and vocabularies
    of the models against each other; eval tasks, metrics and number of documents; memory on device and host.

    Example: optuna-merge check studies/quickstart.yaml
    """
    from optuna_merge.check import check_study
    from optuna_merge.config import load_study

    result = check_study(load_study(file, overrides_of(task_search_path=task_search_path)))
    if as_json:
        print_json(result.as_dict())
        return
    for line in _lines(result):
        typer.echo(line)


def _lines(result: Check) -> list[str]:
    space, tasks, memory = result.space, result.tasks, result.memory
    lines = [
        f"models     {', '.join(result.models)}",
        f"tensors    {result.n_tensors} in each, {result.n_parameters / 1e6:,.1f} M parameters, {result.dtype}:"
        " names, shapes and vocabularies agree",
        f"search     {space['n_dimensions']} dimensions, population {space['population']},"
        f" {space['n_baselines']} baselines first, {result.n_trials} trials in all",
        *([f"           {space['first']} ... {space['last']}"] if space["n_dimensions"] else []),
    ]
    for task in tasks:
        kind = "" if task["weight"] is None else f"{task['weight']:g} x "
        lines.append(f"task       {kind}{task['name']} {task['metric']} (it has {', '.join(task['metrics'])})")
        lines.append(f"           {task['n_searched']} documents searched, {task['n_holdout']} held out")
    lines += [
        f"scoring    {result.n_documents} documents in {result.n_chunks} chunks, {result.n_requests} requests,"
        f" longest {result.longest} tokens; chat template {result.chat_template}",
        f"device     {result.device}: {_gib(memory['device'])} = {_gib(memory['weights'])} weights"
        f" + {_gib(memory['merge_buffer'])} merging + {_gib(memory['scoring'])} scoring (estimated)",
        f"host       {_gib(memory['sources'])} of model files, mapped and not copied; {_gib(memory['host_free'])} free",
    ]
    return [*lines, *(f"warning    {warning}" for warning in result.warnings)]


def _gib(n_bytes: Any) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
