from __future__ import annotations

import logging

import datasets
import lm_eval.api.task
import pytest

from optuna_merge.evaluation.quiet import quietly


def test_only_errors_come_through_and_everything_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lm_eval.api.task")
    bar, bars_were_off = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    with quietly():
        logger.error("hidden from others")
        assert list(lm_eval.api.task.tqdm([1, 2], total=2)) == [1, 2]
        assert datasets.are_progress_bars_disabled()
    logger.error("seen")
    assert caplog.messages == ["seen"]
    assert lm_eval.api.task.tqdm is bar
    assert datasets.are_progress_bars_disabled() == bars_were_off
