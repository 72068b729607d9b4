"""``methods``: lists the merge methods, their parameters and their papers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from optuna_merge.cli import options, output

if TYPE_CHECKING:
    from optuna_merge.methods import MergeMethod, MethodParameter

_BASES = {
    "required": "base required",
    "optional": "base optional",
    "unused": "base unused",
    "none": "no base",
}


def methods(as_json: options.Json = False) -> None:
    """List the merge methods with their parameters and papers.

    Example: optuna-merge methods

    How long a merge takes was measured on one CPU core, for some methods. On a GPU it differs.

    A parameter with a range is searched. A parameter without one keeps its default, unless the study file gives it a
    range under search. A smooth parameter has an exact derivative, which a search can follow; the others choose what
    is kept or dropped.
    """
    from optuna_merge.methods import METHODS

    if as_json:
        output.print_json([asdict(method) for method in METHODS.values()])
        return
    for method in METHODS.values():
        for line in _lines(method):
            typer.echo(line)


def _lines(method: MergeMethod) -> list[str]:
    least, most = method.n_models
    models = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
    return [
        f"{method.name}: {method.summary} ({method.reference})",
        f"  {models} models, {_BASES[method.base]}" + (", random masks" if method.is_random else ""),
        *([f"  {_cost(method.cost)}"] if method.cost is not None else []),
        *([f"  keeps {method.keeps}, see check"] if method.keeps != "nothing" else []),
        *(_parameter_line(parameter) for parameter in method.parameters),
        *(f"  {switch}: default {'true' if default else 'false'}" for switch, default in method.switches),
    ]


def _cost(cost: float) -> str:
    times = "" if cost == 1 else f"about {cost:g} times "
    return f"a merge takes {times}as long as by linear"


def _parameter_line(parameter: MethodParameter) -> str:
    scope = "each model" if parameter.per_model else "all models"
    default = "1 / number of models" if parameter.default is None else f"{parameter.default:g}"
    search = "" if parameter.search is None else f", searched in [{parameter.search[0]:g}, {parameter.search[1]:g}]"
    smooth = ", smooth" if parameter.is_smooth else ""
    return f"  {parameter.name} ({scope}): {parameter.meaning}; default {default}{search}{smooth}"
