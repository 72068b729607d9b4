"""``explain``: which layer groups and models matter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli.options import (
    Json,
    StoragePath,
    StorageUrl,
    StudyFile,
    note,
    open_started,
    overrides_of,
    print_json,
)
from optuna_merge.errors import StudyError

if TYPE_CHECKING:
    from optuna_merge.report.explain import Importances


def explain(
    file: StudyFile,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Write a page with pictures, too.")] = None,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Say which layer groups and models matter: what sets the best tenth of the merges apart. Loads no model.

    Example: optuna-merge explain studies/quickstart.yaml --html explain.html
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.report.explain import explain, pictures_of
    from optuna_merge.report.page import pictures_page
    from optuna_merge.storage.outages import reason

    config = load_study(file, overrides_of(storage_path, storage))
    importances = explain(open_started(config))
    if html is not None:
        title = (
            f"What matters in study {importances.study}: the best tenth of {importances.n_trials} merges against all"
        )
        try:
            html.write_text(pictures_page(title, pictures_of(importances)), encoding="utf-8")
        except OSError as exc:
            raise StudyError(f"{html}: --html must be a file that can be written, got {reason(exc)}") from exc
        note(f"page: {html}")
    if as_json:
        print_json(importances.as_dict())
    else:
        _print(importances)


def _print(importances: Importances) -> None:
    typer.echo(f"study {importances.study}: {importances.n_trials} merges; shares of what sets the best tenth apart")
    top = dict(list(importances.parameters.items())[:10])
    width = max(map(len, [*importances.groups, *importances.models, *top]))
    for title, shares in (("layer groups", importances.groups), ("models", importances.models), ("most of all", top)):
        typer.echo(f"\n{title}")
        for name, share in shares.items():
            typer.echo(f"  {name:<{width}}  {share:.3f}  {'█' * round(40 * share)}")
