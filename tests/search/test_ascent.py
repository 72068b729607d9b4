from __future__ import annotations

import json

import numpy as np
import pytest

from optuna_merge.search.ascent import N_BATCHES, N_PASSES, Array, Ascent, Schedule

N = 40
TOP = np.linspace(-0.2, 1.7, N)  # partly outside the bounds
LOW, HIGH, SCALE = np.zeros(N), np.full(N, 1.5), np.ones(N)


def ascent(n_steps: int = 27) -> Ascent:
    return Ascent(np.full(N, 2 / 3), LOW, HIGH, SCALE, n_steps)


def noisy_gradient(point: Array, step: int) -> Array:
    """That of a hill with slopes of very different size, as small batches of documents would show it."""
    sizes = np.logspace(-4, 0, N)
    return sizes * ((TOP - point) + 0.5 * np.random.default_rng(step).normal(size=N))


def climbed(own: Ascent) -> Array:
    while not own.is_done:
        own.step(noisy_gradient(own.point, own.n_done))
    return own.end()


def test_it_climbs_noisy_hills_whatever_their_slopes_and_stays_inside_the_bounds() -> None:
    nearest = np.clip(TOP, LOW, HIGH)
    own = ascent()
    end = climbed(own)
    assert ((end >= LOW) & (end <= HIGH)).all()
    before, after = np.abs(2 / 3 - nearest), np.abs(end - nearest)
    assert after.mean() < before.mean() / 3
    # the mean of the later points is steadier than the last one
    assert np.square(end - nearest).mean() < np.square(own.point - nearest).mean() + 1e-3


def test_the_first_step_has_the_same_length_in_every_coordinate() -> None:
    own = Ascent(np.full(2, 0.5), np.zeros(2), np.ones(2), np.array([1.0, 0.1]), 10)
    own.step(np.array([1e-3, -2.0]))
    assert own.point == pytest.approx([0.6, 0.49])


@pytest.mark.parametrize("n_steps", [1, 2, 27])
def test_it_resumes_bit_for_bit_after_any_step(n_steps: int) -> None:
    expected = climbed(ascent(n_steps))
    for stop in range(1, n_steps + 1):
        first, second = ascent(n_steps), ascent(n_steps)
        while first.n_done < stop:
            first.step(noisy_gradient(first.point, first.n_done))
        second.resume(json.loads(json.dumps(first.state())))
        assert second.n_done == stop
        np.testing.assert_array_equal(climbed(second), expected)


@pytest.mark.parametrize(("n_chunks", "n_batches"), [(1, 1), (5, 5), (9, 9), (50, N_BATCHES)])
def test_a_pass_differentiates_every_chunk_once(n_chunks: int, n_batches: int) -> None:
    schedule = Schedule.draw(n_chunks, seed=3)
    assert schedule == Schedule.draw(n_chunks, seed=3)
    assert schedule.n_steps == N_PASSES * n_batches
    for start in range(0, schedule.n_steps, n_batches):
        batches = schedule.batches[start : start + n_batches]
        assert sorted(chunk for batch in batches for chunk in batch) == list(range(n_chunks))
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
    if n_chunks > 1:
        assert schedule != Schedule.draw(n_chunks, seed=4)
