"""The section ``search``: which parameters are searched, in which ranges, and where the search starts.

Knows how a range, a prior and a warm start are written; does not know which parameters a merge method has, see
``contradictions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, model_validator

from optuna_merge.config.paths import FilePath, StorageUrl
from optuna_merge.config.section import Section, short_form


class Range(Section):
    """The range of a searched method parameter, or its constant if ``low == high``.

    Attributes:
        low, high: Both included.
        start: Where the search starts; None: the method's default.
    """

    low: float
    high: float
    start: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float | list | tuple | Mapping):
            raise ValueError("a number (constant), [low, high] or {low: ..., high: ..., start: ...}")
        if isinstance(value, int | float):
            return {"low": float(value), "high": float(value)}
        if isinstance(value, list | tuple):
            if len(value) != 2:
                raise ValueError("a list of two numbers, [low, high]")
            return {"low": value[0], "high": value[1]}
        return dict(value)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError("a range whose low is not above its high")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError("a range whose start lies inside it")
        return self

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to search."""
        return self.low == self.high


class StructuredPrior(Section):
    """CMA-ES draws its first weights as the sum of three normal parts; here are their standard deviations.

    Attributes:
        name: ``structured``.
        common: Of the part that all weights share, in units of weight.
        model: Of the part that the weights of one model share.
        weight: Of each weight's own part. Not 0, which would leave directions that are never searched.
    """

    name: Literal["structured"] = "structured"
    common: float = Field(0.2, ge=0, le=10)
    model: float = Field(0.15, ge=0, le=10)
    weight: float = Field(0.12, ge=0.001, le=10)


class IsotropicPrior(Section):
    """CMA-ES draws its first weights independently, with a sixth of each range as standard deviation.

    Attributes:
        name: ``isotropic``.
    """

    name: Literal["isotropic"] = "isotropic"


PriorConfig = Annotated[StructuredPrior | IsotropicPrior, Discriminator("name"), short_form("structured")]
"""How far the first weights spread: by name, or with options."""


class WarmStartConfig(Section):
    """Another study, whose best trials say where the search starts.

    Attributes:
        file: Its study file; None if ``study`` and ``storage`` are given.
        study: Its name.
        storage: Its Optuna storage URL.
        n_best: The search starts at the weighted mean of this many trials.
    """

    file: FilePath | None = None
    study: str | None = Field(None, min_length=1)
    storage: StorageUrl | None = Field(None, min_length=1)
    n_best: int = Field(5, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _file_only(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _check(self) -> WarmStartConfig:
        is_named = self.study is not None and self.storage is not None
        if (self.file is None) != is_named or (self.file is not None and (self.study or self.storage)):
            raise ValueError("a study file, or {study: NAME, storage: URL}")
        return self

    @property
    def label(self) -> str:
        """What to call it, wherever it lies: the name of the study file or of the study."""
        return self.study or (self.file.name if self.file else "")


class SearchConfig(Section):
    """What is searched.

    Attributes:
        ranges: Method parameter to its range or constant. In the file, these are keys of ``search`` itself.
        embed_group: ``shared``: embeddings belong to the first layer group, final norm and head to the last;
            ``own``: they are groups of their own.
        prior: How far the first weights of CMA-ES spread.
        warm_start: Another study, at whose best trials the search starts; None: start at the best uniform merge.
        start: ``uniform``: the first trials are drawn around that point; ``ascent``: the search first follows the
            gradient of the expected score from there; ``auto``: the ascent where it can run and pays, which is decided
            when the study is created (``study/start.py``).
        profile: What the ascent finds: ``tensor``: a weight for each tensor and model, of which the trials then vary
            the means over layer groups; ``group``: those means alone.
    """

    ranges: Mapping[str, Range] = Field(default_factory=dict)
    embed_group: Literal["shared", "own"] = "shared"
    prior: PriorConfig = StructuredPrior()
    warm_start: WarmStartConfig | None = None
    start: Literal["auto", "uniform", "ascent"] = "auto"
    profile: Literal["tensor", "group"] = "tensor"

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys that are not a parameter of a merge method."""
        return [key for key in cls.known_keys() if key != "ranges"]

    @model_validator(mode="before")
    @classmethod
    def _gather_ranges(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        own = {key: value[key] for key in cls.own_keys() if key in value}
        ranges = {str(key): item for key, item in value.items() if key not in own and item is not None}
        return {**own, "ranges": ranges}
