"""The section ``study.pruner``: which pruner ends weak trials early.

Knows the options of each pruner and their bounds; does not know how many chunks there are to prune between. Optuna's
pruners that compare intermediate values are not offered: a chunk's score is mostly noise, and comparing trials chunk by
chunk needs fewer documents (measured in ``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field

from optuna_merge.config.section import Section, short_form


class _Pruner(Section):
    """An option without a value keeps the default of the pruner class."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the pruner class that the study file gives."""
        return {key: value for key, value in self.model_dump(exclude={"name"}).items() if value is not None}


class WilcoxonConfig(_Pruner):
    """The project's own signed-rank pruner, with the option names of Optuna's ``WilcoxonPruner``.

    Attributes:
        name: ``wilcoxon``.
        p_threshold: Significance level at which a trial counts as worse than the best one and is stopped; None: 0.1.
        n_startup_steps: Chunks before the first comparison; None: 4.
    """

    name: Literal["wilcoxon"] = "wilcoxon"
    p_threshold: float | None = Field(None, gt=0, lt=1)
    n_startup_steps: int | None = Field(None, ge=0)


class NoPrunerConfig(_Pruner):
    """Every trial is scored in full.

    Attributes:
        name: ``none``.
    """

    name: Literal["none"] = "none"


_REMOVED = ("median", "hyperband", "successive_halving")


def _refuse_removed(value: Any) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else value
    if name in _REMOVED:
        raise ValueError(f"wilcoxon or none (without {', '.join(_REMOVED)}, which compared single noisy chunks)")
    return value


PrunerConfig = Annotated[
    WilcoxonConfig | NoPrunerConfig, Discriminator("name"), short_form("wilcoxon"), BeforeValidator(_refuse_removed)
]
"""A pruner by its name, or with its options."""
