"""The section ``study.sampler``: which sampler draws the weights.

Knows the options of the project's own samplers; does not know those of Optuna's, which ``search`` checks when it makes
the sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from optuna_merge.config.section import OpenSection, Section, short_form

SAMPLERS = ("cmaes", "gp", "nsga2", "random", "tpe")
"""The short names; any other sampler is named by the import path of its class."""

PARETO_SAMPLER = "tpe"
"""The default sampler with ``goal: pareto``."""


class CmaEsConfig(Section):
    """CMA-ES, with every n-th trial drawn by a Gaussian process.

    Attributes:
        name: ``cmaes``.
        popsize: Trials in a generation; None: 4 + floor(3 ln dimensions), or more with several workers.
        sigma0: First step as a fraction of each range, the same for all; None: as ``search.prior`` says.
        gp_every: Draw every n-th trial with a Gaussian process; 0 disables it; None: 5.
    """

    name: Literal["cmaes"] = "cmaes"
    popsize: int | None = Field(None, ge=3)
    sigma0: float | None = Field(None, gt=0, le=1)
    gp_every: int | None = Field(None, ge=0)


class RandomSamplerConfig(Section):
    """Independent uniform draws.

    Attributes:
        name: ``random``.
    """

    name: Literal["random"] = "random"


class OptunaSamplerConfig(OpenSection):
    """A sampler class of Optuna or of the user. Every other key is an argument of the class.

    Attributes:
        name: ``gp``, ``tpe``, ``nsga2``, or the import path of a sampler class.
    """

    name: str

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value not in SAMPLERS and "." not in value:
            raise ValueError(f"{', '.join(SAMPLERS)}, or the import path of a sampler class")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the class that the study file gives."""
        return dict(self.model_extra or {})


def _tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return name if name in ("cmaes", "random") else "other"


SamplerConfig = Annotated[
    Annotated[CmaEsConfig, Tag("cmaes")]
    | Annotated[RandomSamplerConfig, Tag("random")]
    | Annotated[OptunaSamplerConfig, Tag("other")],
    Discriminator(_tag),
    short_form("cmaes"),
]
"""A sampler by its name, or with its options."""
