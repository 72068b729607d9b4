"""The section ``study.pruner``: which pruner ends weak trials early.

Knows the options of each pruner and their bounds; does not know how many chunks there are to prune between.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field

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


class MedianConfig(_Pruner):
    """Optuna's ``MedianPruner``, with Optuna's options and defaults.

    Attributes:
        name: ``median``.
        n_startup_trials: Trials before the first that may be pruned; None: 5.
        n_warmup_steps: Chunks of a trial before its first comparison; None: 0.
    """

    name: Literal["median"] = "median"
    n_startup_trials: int | None = Field(None, ge=0)
    n_warmup_steps: int | None = Field(None, ge=0)


class HyperbandConfig(_Pruner):
    """Optuna's ``HyperbandPruner``, with Optuna's options and defaults.

    Attributes:
        name: ``hyperband``.
        min_resource: Chunks of a trial before its first comparison; None: 1.
        reduction_factor: At each comparison, one of this many trials continues; None: 3.
    """

    name: Literal["hyperband"] = "hyperband"
    min_resource: int | None = Field(None, ge=1)
    reduction_factor: int | None = Field(None, ge=2)


class SuccessiveHalvingConfig(_Pruner):
    """Optuna's ``SuccessiveHalvingPruner``, with Optuna's options; ``min_resource`` is Optuna's ``auto`` if not given.

    Attributes:
        name: ``successive_halving``.
        min_resource: Chunks of a trial before its first comparison.
        reduction_factor: At each comparison, one of this many trials continues; None: 4.
    """

    name: Literal["successive_halving"] = "successive_halving"
    min_resource: int | None = Field(None, ge=1)
    reduction_factor: int | None = Field(None, ge=2)


class NoPrunerConfig(_Pruner):
    """Every trial is scored in full.

    Attributes:
        name: ``none``.
    """

    name: Literal["none"] = "none"


PrunerConfig = Annotated[
    WilcoxonConfig | MedianConfig | HyperbandConfig | SuccessiveHalvingConfig | NoPrunerConfig,
    Discriminator("name"),
    short_form("wilcoxon"),
]
"""A pruner by its name, or with its options."""
