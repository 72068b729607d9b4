"""The base classes of all sections of a study file.

Knows how a section treats keys that have no value or that it does not know; does not know any key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator

YAML_LIST = Strict(False)
"""Marks a tuple that is written as a list: YAML knows no tuples, and a frozen config holds no lists."""


class Section(BaseModel):
    """A mapping of keys. A key without a value means the key's default; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def known_keys(cls) -> list[str]:
        """The keys as they are written in the file."""
        return [name for name, field in cls.model_fields.items() if field.validation_alias is None]

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in cls.known_keys()}


class OpenSection(Section):
    """A section that also takes options which only a library knows; these may have no value either."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, value: Any) -> Any:
        return _without_nulls(value)


def short_form(default: str) -> BeforeValidator:
    """Let a plain name stand for ``{name: ...}``, and ``default`` for a missing name."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and value.get("name") is None:
            return {**value, "name": default}
        return value

    return BeforeValidator(read)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
