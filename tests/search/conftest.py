"""What the tests of samplers share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import optuna
import pytest


@pytest.fixture
def no_warnings() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    optuna.logging.set_verbosity(level)
