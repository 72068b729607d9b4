"""``methods``: the merge methods, what they take and where they come from."""

from __future__ import annotations

from dataclasses import asdict

import typer

from optuna_merge.cli.options import Json, print_json


def methods(as_json: Json = False) -> None:
    """List the merge methods with their parameters and papers.

    Example: optuna-merge methods

    A parameter with a range is searched; one without stays at its default unless the study file gives it a range under
    search.
    """
    from optuna_merge.methods import METHODS

    if as_json:
        print_json([asdict(method) for method in METHODS.values()])
        return
    for method in METHODS.values():
        least, most = method.n_models
        models = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
        base = {
            "required": "needs a base",
            "optional": "takes a base",
            "unused": "no use for a base",
            "none": "no base",
        }
        typer.echo(f"{method.name}: {method.summary} ({method.reference})")
        typer.echo(f"  models {models}, {base[method.base]}" + (", random masks" if method.is_random else ""))
        for parameter in method.parameters:
            default = "1 / number of models" if parameter.default is None else f"{parameter.default:g}"
            search = (
                "" if parameter.search is None else f", searched in [{parameter.search[0]:g}, {parameter.search[1]:g}]"
            )
            scope = "each model" if parameter.per_model else "all models"
            typer.echo(f"  {parameter.name} ({scope}): {parameter.meaning}; default {default}{search}")
        for switch, default_on in method.switches:
            typer.echo(f"  {switch}: {'true' if default_on else 'false'} by default")
