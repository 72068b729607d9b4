"""Silence for lm-eval and datasets while we call them; their handlers and progress bars are put back afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets

from optuna_merge.internals.lm_eval import without_progress_bar

__all__ = ["quietly"]

_ERRORS = logging.StreamHandler()
_ERRORS.setLevel(logging.ERROR)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Stop lm-eval and datasets from drawing progress bars and logging; errors still come through."""
    logger = logging.getLogger("lm_eval")
    handlers, propagate = logger.handlers, logger.propagate
    bars_were_on = not datasets.are_progress_bars_disabled()
    # not setLevel: it clears the cache of every logger in the process, which costs milliseconds
    logger.handlers, logger.propagate = [_ERRORS], False
    datasets.disable_progress_bars()
    try:
        with without_progress_bar():
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if bars_were_on:
            datasets.enable_progress_bars()
