"""Fixtures that load a study file from its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import ConfigError


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str | bytes, overrides: dict[str, Any] | None = None) -> StudyConfig:
        path = tmp_path / "my_study.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_study(path, overrides)

    return load


@pytest.fixture
def problems(load: Any, tmp_path: Path) -> Any:
    """The lines of the error, without the folder."""

    def problems(text: str | bytes, overrides: dict[str, Any] | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [line.replace(f"{tmp_path}/", "") for line in caught.value.problems]

    return problems
