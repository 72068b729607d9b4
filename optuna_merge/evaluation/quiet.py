"""Silence for lm-eval and datasets while we call them; their handlers and bars are put back afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets
import lm_eval.api.task

__all__ = ["quietly"]

_ERRORS = logging.StreamHandler()
_ERRORS.setLevel(logging.ERROR)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval and datasets from drawing bars and from telling what they do; errors still come through."""
    logger = logging.getLogger("lm_eval")
    handlers, propagate = logger.handlers, logger.propagate
    bar = lm_eval.api.task.tqdm
    bars_were_on = not datasets.are_progress_bars_disabled()
    # not setLevel, which costs milliseconds: it makes every logger of the process forget what it may log
    logger.handlers, logger.propagate = [_ERRORS], False
    # build_all_requests has no switch for its bar
    setattr(lm_eval.api.task, "tqdm", lambda items, **_: items)  # noqa: B010 - mypy sees no such attribute
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        setattr(lm_eval.api.task, "tqdm", bar)  # noqa: B010
        if bars_were_on:
            datasets.enable_progress_bars()
