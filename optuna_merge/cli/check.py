"""``check``: validates a study file and shows the plan, without loading weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optuna_merge.cli import options, output

if TYPE_CHECKING:
    from optuna_merge.study.check import Check


_SHOWN = (
    "n_trials",
    "task_search_path",
    "device",
    "workers",
    "devices",
    "num_gpus",
    "batch_size",
    "force_population_size",
    "merge_cuda",
    "vllm",
    "load_in_8bit",
    "load_in_4bit",
    "trust_remote_code",
    "as_json",
)


@options.takes_study(shown=_SHOWN)
def check(
    given: options.StudyArguments,
    card: Annotated[
        str | None,
        typer.Option("--card", metavar="SIZE", help="Memory of the GPU, such as 24GB; default: that of the GPU here."),
    ] = None,
) -> None:
    """Validate the study file and show the plan, in seconds, without loading weights.

    It checks the study file; the number of dimensions and the population; that names, shapes and vocabularies of the
    models agree; eval tasks, metrics and numbers of documents; that the judge answers and has its model; and that the
    memory of device and host suffices.

    Example: optuna-merge check studies/quickstart.yaml --card 24GB
    """
    from optuna_merge.study.check import check_study
    from optuna_merge.study.memory import parse_size

    result = check_study(given.load(), None if card is None else parse_size(card))
    if given.as_json:
        output.print_json(result.as_dict())
        return
    for line in _lines(result):
        typer.echo(line)


def _lines(result: Check) -> list[str]:
    from optuna_merge.study.memory import gib

    space, tasks, memory = result.space, result.tasks, result.memory
    lines = [
        f"models     {', '.join(result.models)}",
        f"tensors    {result.n_tensors} in each, {result.n_parameters / 1e6:,.1f} M parameters, {result.dtype}:"
        " names, shapes and vocabularies agree",
        *([] if result.copied is None else [_copied_line(**result.copied)]),
        f"search     {space['n_dimensions']} dimensions, population {space['population']},"
        f" {space['n_baselines']} baselines first, {result.n_trials} trials in all",
        *([f"           {space['first']} ... {space['last']}"] if space["n_dimensions"] else []),
        *([f"           begins {space['warm_start']}"] if space["warm_start"] else []),
        *([f"           begins {space['ascent']}"] if space["ascent"] else []),
        *([f"           begins at a uniform merge; {space['why_uniform']}"] if space["why_uniform"] else []),
        *([f"           begins with {space['race']}"] if space["race"] else []),
    ]
    for task in tasks:
        kind = "" if task["weight"] is None else f"{task['weight']:g} x "
        lines.append(f"task       {kind}{task['name']} {task['metric']} (it has {', '.join(task['metrics'])})")
        slope = "; the metric has no gradient" if task["has_gradient"] is False else ""
        lines.append(f"           {task['n_searched']} documents searched, {task['n_holdout']} held out{slope}")
    lines += [
        f"scoring    {result.n_documents} documents in {result.n_chunks} chunks, {result.n_requests} requests,"
        f" longest {result.longest} tokens; chat template {result.chat_template}",
        f"device     {result.device}: {result.memory_line}",
        f"host       {gib(memory['source_files'])} of model files; {gib(memory['host_free'])} free",
        _sources_line(result.sources),
        *_kept_lines(result.kept),
        *([] if result.judge is None else [_judge_line(**result.judge)]),
        *([] if result.trial_seconds is None else [_seconds_line(**result.trial_seconds)]),
        *_ascent_lines(result),
    ]
    return [*lines, *(f"warning    {warning}" for warning in result.warnings)]


def _copied_line(model: str, n_parameters: int, parts: list[str], names: list[str]) -> str:
    return (
        f"copied     {len(names)} tensors of {model}, {n_parameters / 1e6:,.1f} M parameters, which no other model has:"
        f" {', '.join(parts)} (--json names each)"
    )


def _judge_line(model: str, url: str, budget: int | None, most: int, against: str | None) -> str:
    from optuna_merge.config.judge import BEST_SOURCE

    allowed = "" if budget is None else f"; judge.budget allows {budget:,}"
    whose = "the best source, as the other tasks tell" if against == BEST_SOURCE else against
    pairs = "" if against is None else f"; answers are compared with those of {whose}"
    return f"judge      {model} at {url}: at most {most:,} questions in the whole study{allowed}{pairs}"


def _seconds_line(merging: float, choices: float, texts: float) -> str:
    parts = {"merging": merging, "choices": choices, "generated texts at their longest": texts}
    shown = ", ".join(f"{seconds:.2g} s {name}" for name, seconds in parts.items() if seconds)
    return f"trial      about {merging + choices + texts:.2g} s on all documents: {shown} (by samples)"


def _ascent_lines(result: Check) -> list[str]:
    if result.ascent_seconds is None or result.trial_seconds is None:
        return []
    times = result.ascent_seconds / (sum(result.trial_seconds.values()) or 1)
    return [f"ascent     about {result.ascent_seconds:.2g} s, as long as {times:.0f} trials"]


def _sources_line(sources: dict[str, Any] | None) -> str:
    from optuna_merge.study.memory import gib

    if sources is None:
        return "sources    disk (mapped files, merged by vLLM's workers)"
    time = "" if sources["seconds"] is None else f", about {sources['seconds']:.2g} s by a sample"
    read = f"a merge reads {gib(sources['n_bytes'])}{time}"
    return f"sources    {sources['placement']} ({sources['reason']}); {read}"


def _kept_lines(kept: dict[str, Any] | None) -> list[str]:
    from optuna_merge.study.memory import gib

    if kept is None:
        return []
    return [
        f"kept       {gib(kept['n_bytes'])} of matrices in {kept['folder']}, mapped into memory; the first merge makes"
        f" them in about {kept['seconds']:,.0f} s by a sample, with {gib(kept['memory'])} of host memory"
    ]
