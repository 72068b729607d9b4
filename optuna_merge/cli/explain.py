"""``explain``: shows which layer groups and models matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from optuna_merge.cli import options, output

if TYPE_CHECKING:
    from optuna_merge.report.explain import Importances


@options.takes_study(shown=("storage_path", "storage", "as_json"))
def explain(given: options.StudyArguments, html: options.Html = None) -> None:
    """Show which layer groups and models matter, that is, where the best tenth of the merges differs from the rest.

    Loads no model. A share tells how much, not in which direction. If the study began with an ascent, the slopes of the
    expected score follow: how much it rises per unit of a weight.

    Example: optuna-merge explain studies/quickstart.yaml --html explain.html
    """
    from optuna_merge.report.explain import explain, pictures_of
    from optuna_merge.report.page import pictures_page

    _, study = given.open()
    importances = explain(study)
    if html is not None:
        title = (
            f"What matters in study {importances.study}: the best tenth of {importances.n_trials} merges against all"
        )
        output.write_page(html, pictures_page(title, pictures_of(importances)))
    if given.as_json:
        output.print_json(importances.as_dict())
    else:
        _print(importances)


def _print(importances: Importances) -> None:
    typer.echo(f"study {importances.study}: {importances.n_trials} merges; shares of what sets the best tenth apart")
    top = dict(list(importances.parameters.items())[:10])
    width = max(map(len, [*importances.groups, *importances.models, *top]))
    parts = (("layer groups", importances.groups), ("models", importances.models), ("largest parameters", top))
    for title, shares in parts:
        typer.echo(f"\n{title}")
        for name, share in shares.items():
            typer.echo(f"  {name:<{width}}  {share:.3f}  {'█' * round(40 * share)}")
    if importances.slopes:
        slopes = dict(list(importances.slopes.items())[:10])
        width = max(map(len, slopes))
        typer.echo("\nlargest slopes of the expected score, where the ascent begins and where it ends")
        for name, (first, last) in slopes.items():
            typer.echo(f"  {name:<{width}}  {first:+.3f}  {last:+.3f}")
