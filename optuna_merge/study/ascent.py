"""The first trial of a study that begins with the ascent: where its parameters come from.

    starts -> the best of them on the first documents -> step, record, step, record ... -> mean of the later points

Joins the optimizer (``search/ascent.py``), the gradient of the expected score (``evaluation``), the way back through
the merge (``merging/pullback.py``) and the record (``storage/ascent.py``). Knows no trial but the one that it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import NonFiniteMergeError, StudyError
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.internals.optuna import fix_params, known_state
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.pullback import Pullback
from optuna_merge.recipe import Recipe
from optuna_merge.search.ascent import Array, Ascent, Schedule
from optuna_merge.search.ascent_space import AscentSpace
from optuna_merge.search.profile import TensorPlace
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentEnd, AscentStep, end_of_ascent, read_state, record_step, steps_of

_DIGITS = 4

OnStep = Callable[[AscentStep, int, int], None]
"""Called after each step with the step, the number of steps taken, and the number of all."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken, and what it has led to.

    Attributes:
        step: The step.
        n_steps: Number of all steps.
        state: What the next step follows from.
        end: What the ascent has found; None before the last step.
    """

    step: AscentStep
    n_steps: int
    state: dict[str, Any]
    end: AscentEnd | None


Climb = Callable[[Sequence[dict[str, float]], dict[str, Any] | None], Generator[Taken]]
"""Takes the steps of an ascent: see :meth:`Climber.climb`."""


def ascend(trial: optuna.Trial, climb: Climb, starts: Sequence[dict[str, float]], on_step: OnStep) -> AscentEnd:
    """Take the steps that the trial has not recorded yet, and let it suggest the parameters at their end.

    Args:
        trial: A running trial.
        climb: Takes the steps.
        starts: Trial parameters of possible starts, at least one.
        on_step: Is told of each step.

    Returns:
        The end. It and the steps depend on nothing but the study, however often the ascent was interrupted.

    Raises:
        OptunaMergeError: What ``climb`` raises.
    """
    end = end_of_ascent([known_state(trial)])
    steps = steps_of(known_state(trial))
    if end is None:
        with closing(climb(starts, read_state(trial))) as climbing:
            for taken in climbing:
                steps.append(taken.step)
                end = taken.end
                record_step(trial, steps, taken.state, end)
                on_step(taken.step, len(steps), taken.n_steps)
    assert end is not None
    trial.set_user_attr(attributes.ASCENT_DOCUMENTS, sum(step.n_documents for step in steps))
    trial.set_user_attr(attributes.ASCENT_SECONDS, round(math.fsum(step.seconds for step in steps), 4))
    fix_params(trial, end.params)
    return end


@dataclass(frozen=True)
class Slope:
    """The expected score of a merge on some documents.

    Attributes:
        value: The expected score.
        gradient: Its derivatives by the coordinates of the ascent, ``[n]``.
        n_documents: How many documents.
    """

    value: float
    gradient: Array
    n_documents: int


class Climber:
    """Takes the steps of a study's ascent. Knows no trial.

    Args:
        config: The study file.
        space: Its search space.
        places: The tensors that are merged.
        scorer: Its eval tasks, for an engine that differentiates.
        merger: Its models.
        load: Merges a recipe into the resident model.
    """

    def __init__(
        self,
        config: StudyConfig,
        space: SearchSpace,
        places: Sequence[TensorPlace],
        scorer: Scorer,
        merger: Merger,
        load: Callable[[Recipe], object],
    ) -> None:
        self._space = space
        self._scorer = scorer
        self._merger = merger
        self._load = load
        self._coordinates = AscentSpace(space, places, config.search.profile)
        self._schedule = Schedule.draw(scorer.n_chunks, config.study.seed)

    def climb(self, starts: Sequence[dict[str, float]], state: dict[str, Any] | None) -> Generator[Taken]:
        """Take one step after another, each when it is asked for.

        Args:
            starts: Trial parameters of possible starts, at least one.
            state: Where an earlier call stopped; None: at the beginning.

        Raises:
            NonFiniteMergeError: If a merge or the gradient holds NaN or infinity.
            StudyError: If no metric of the score has a gradient.
        """
        others = starts[0]
        begun, n_tried = time.perf_counter(), 0
        first = starts[0]
        if state is None and len(starts) > 1:
            values = [self._expected(start, self._schedule.batches[0]) for start in starts]
            first, n_tried = starts[int(np.argmax(values))], len(starts)
        point = self._coordinates.point(first)
        own = self._coordinates
        ascent = Ascent(point, own.low, own.high, own.scale, self._schedule.n_steps)
        if state is not None:
            ascent.resume(state)
        while True:
            slope = self._slope(ascent.point, others, self._schedule.batches[ascent.n_done])
            ascent.step(slope.gradient)
            reached = ascent.end() if ascent.is_done else ascent.point
            params, profile = own.split(reached, others)
            step = AscentStep(
                expected=slope.value,
                n_documents=slope.n_documents * (1 + n_tried),
                seconds=round(time.perf_counter() - begun, _DIGITS),
                params={name: round(value, _DIGITS) for name, value in params.items()},
                slope={name: round(value, _DIGITS) for name, value in own.slope(slope.gradient).items()},
            )
            end = AscentEnd(params, profile.to_json() if profile else "") if ascent.is_done else None
            yield Taken(step, self._schedule.n_steps, ascent.state(), end)
            if end is not None:
                return
            begun, n_tried = time.perf_counter(), 0

    def _expected(self, start: dict[str, float], chunks: Sequence[int]) -> float:
        """The expected score of a start on some chunks."""
        self._load(self._space.decode(start))
        return math.fsum(self._scorer.expected_score(chunk) for chunk in chunks)

    def _slope(self, point: Array, others: dict[str, float], chunks: Sequence[int]) -> Slope:
        """The slope at a point, on the documents of some chunks."""
        params, profile = self._coordinates.split(point, others)
        recipe = self._space.decode(params, profile)
        self._load(recipe)
        pullback = Pullback(self._merger, recipe)
        values = []
        for chunk in chunks:
            expectation = self._scorer.differentiate_chunk(chunk, pullback.add, generate=False)
            if not expectation.tasks:
                raise StudyError(
                    "search.start: must be uniform for a score without a gradient, got ascent; no metric has a right"
                    " answer whose probability could be differentiated: name one with gradient_target in the task"
                )
            values.append(expectation.value)
        found = pullback.result()
        gradient = self._coordinates.gradient(found.tensors, found.numbers) / len(chunks)
        value = math.fsum(values) / len(chunks)
        if not np.isfinite(gradient).all() or not math.isfinite(value):
            raise NonFiniteMergeError(
                f"ascent: expected score and gradient must be finite, got {value} and a gradient with NaN or infinity;"
                " use engine.dtype: bfloat16 or float32, or search.start: uniform"
            )
        n_documents = sum(self._scorer.n_documents_in(chunk) for chunk in chunks)
        return Slope(value, gradient, n_documents)
