"""An ascent in a process of its own: for a study whose engine has no gradients, as vLLM has none.

    study (vLLM stopped)  -- study file, starts, state -->  process: opens the models, transformers engine, Climber
                          <--- step, state ... end --------  one message for each step

The process has the device to itself, knows no storage, and ends before vLLM starts: with its last step, with the
study's process, and whenever the study wants no more steps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import EngineError, OptunaMergeError
from optuna_merge.search.race import make_spaces
from optuna_merge.study.ascent import Climb, Climber, Taken
from optuna_merge.study.engines import make_loader, with_transformers
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels

_END_S = 10.0


def climb_apart(
    config: StudyConfig, prefix: str, n_chunks: int, device: str, make_room: Callable[[], None] = lambda: None
) -> Climb:
    """Take the steps of an ascent in a process of its own, with the transformers engine.

    Args:
        config: The study file.
        prefix: Of the search space that is climbed.
        n_chunks: Into which the study's documents are cut.
        device: Where the process computes; nothing else should need its memory meanwhile.
        make_room: Called before the process starts, to free that memory.

    Returns:
        What ``Climber.climb`` is elsewhere. The seconds of the first step include those until the process is ready.
        Beside the errors of ``Climber.climb`` it raises ``EngineError`` if the process dies.
    """
    apart = with_transformers(config, n_chunks, device)

    def climb(starts: Sequence[dict[str, float]], state: dict[str, Any] | None) -> Generator[Taken]:
        make_room()
        begun = time.perf_counter()
        context = multiprocessing.get_context("spawn")  # a fork would have CUDA's state without its threads
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(theirs, apart, prefix, list(starts), state), daemon=True)
        process.start()
        theirs.close()
        try:
            while True:
                try:
                    received: Taken | OptunaMergeError = ours.recv()
                except EOFError:
                    process.join(_END_S)
                    raise EngineError(
                        "engine: the process of the ascent must live until its last step, died with exit code"
                        f" {process.exitcode}; see its messages above, and run the same command again or use"
                        " search.start: uniform"
                    ) from None
                if isinstance(received, OptunaMergeError):
                    raise received
                if received.end is not None:
                    process.join(_END_S)  # by then the device's memory is free
                now = time.perf_counter()
                yield replace(received, step=replace(received.step, seconds=round(now - begun, 4)))
                begun = now
                if received.end is not None:
                    return
        finally:
            process.kill()
            process.join()
            ours.close()

    return climb


def _run(
    connection: Connection,
    config: StudyConfig,
    prefix: str,
    starts: Sequence[dict[str, float]],
    state: dict[str, Any] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the study, too, which ends this process
    _end_with_parent()
    try:
        models = StudyModels.open(config)
        loader, scorer = make_loader(config, models)
        assert isinstance(loader, LocalLoader)
        [space] = [space for space in make_spaces(config, models.refs).values() if space.prefix == prefix]

        for taken in Climber(config, space, models.places, scorer, loader.merger, loader.load).climb(starts, state):
            connection.send(taken)
    except OptunaMergeError as exc:
        connection.send(exc)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, even if that is killed. Returns at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
