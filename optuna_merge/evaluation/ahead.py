"""Lets the engine answer the next chunk while a judge is asked about the last one.

The pruner decides as ever, between two chunks. If it ends the trial, the next chunk has been answered in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

from optuna_merge.evaluation.results import ChunkResult
from optuna_merge.evaluation.scorer import Scorer

_PAUSE_S = 0.1


class Ahead:
    """Scores the chunks of one model, in order; results are those of ``Scorer.score_chunk``.

    Args:
        scorer: Scores; without a judge, nothing is answered ahead.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._answered: dict[int, Callable[[], ChunkResult]] = {}

    def score(self, chunk: int, following: int | None) -> ChunkResult:
        """Score one chunk.

        Args:
            chunk: Its number.
            following: Number of the chunk that is scored after it, if the trial goes on; None if none is.

        Raises:
            TaskError, EngineError, JudgeError: As ``Scorer.score_chunk``, for either chunk.
        """
        judge = self._scorer.judge
        if judge is None:
            return self._scorer.score_chunk(chunk)
        finish = self._answered.pop(chunk, None) or self._scorer.answer_chunk(chunk)
        if following is None:
            return finish()
        with ThreadPoolExecutor(1, thread_name_prefix="values") as pool:
            result = pool.submit(finish)
            try:
                self._answered[following] = self._scorer.answer_chunk(following)
                return result.result()
            except BaseException:
                try:
                    while not wait([result], _PAUSE_S).done:  # for the questions that are open
                        judge.stop()
                except KeyboardInterrupt:  # a second one
                    judge.leave()
                    raise
                raise
