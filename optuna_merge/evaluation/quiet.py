"""Silence for lm-eval and datasets while we call them; their levels and bars are put back afterwards."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets
import lm_eval.api.task

__all__ = ["quietly"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep lm-eval and datasets from drawing bars and from telling what they do; errors still come through."""
    logger = logging.getLogger("lm_eval")
    old_level, old_bar = logger.level, lm_eval.api.task.tqdm
    bars_were_on = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    # build_all_requests has no switch for its bar
    setattr(lm_eval.api.task, "tqdm", lambda items, **_: items)  # noqa: B010 - mypy sees no such attribute
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(old_level)
        setattr(lm_eval.api.task, "tqdm", old_bar)  # noqa: B010
        if bars_were_on:
            datasets.enable_progress_bars()
