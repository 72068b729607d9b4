"""What CMA-ES draws, which trials it is told, and what spaces it can search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.search.named import RepeatableSampler, make_gp
from optuna_merge.search.samplers import StableCmaEsSampler
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import generation
from tests.search.bowl import POPSIZE, SPACE, loss, made, objective, points, suggest

pytestmark = pytest.mark.usefixtures("no_warnings")


class Corner(optuna.samplers.BaseSampler):
    """Proposes one point from trial 6 on."""

    POINT: ClassVar = {name: d.low + 0.3 * (d.high - d.low) for name, d in SPACE.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        raise AssertionError("it is given the space")

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        assert search_space == SPACE
        return self.POINT if trial.number >= 6 else {}

    def sample_independent(self, *_: Any) -> Any:
        raise AssertionError("it draws whole points")


# --- what CMA-ES draws


def test_an_injected_point_takes_the_place_of_one_and_counts_in_its_generation() -> None:
    sampler = StableCmaEsSampler(SPACE, seed=5, injected=Corner(), inject_every=3)
    study, plain = made(sampler), made()
    study.optimize(objective, 4 * POPSIZE)
    plain.optimize(objective, 4 * POPSIZE)
    injected = [trial.number for trial in study.trials if trial.params == Corner.POINT]
    assert injected == list(range(6, 4 * POPSIZE, 3))
    assert [generation(t) for t in study.trials] == [g for g in range(4) for _ in range(POPSIZE)]
    assert points(study)[:6] == points(plain)[:6]
    assert points(study)[7] == points(plain)[7]
    assert points(study)[POPSIZE] != points(plain)[POPSIZE]  # CMA-ES has learned from it


def test_an_injected_process_finds_the_bottom_of_a_bowl_sooner() -> None:
    study, plain = made(StableCmaEsSampler(SPACE, seed=5, injected=make_gp(list(SPACE), 5))), made()
    study.optimize(objective, 40)
    plain.optimize(objective, 40)
    assert study.best_value < plain.best_value / 10
    again = made(StableCmaEsSampler(SPACE, seed=5, injected=make_gp(list(SPACE), 5)))
    again.add_trials(study.trials[:30])
    again.optimize(objective, 10)
    assert points(again) == points(study)


def test_a_sampler_can_be_shown_the_latest_trials_only() -> None:
    class Counting(Corner):
        seen: ClassVar[list[list[int]]] = []

        def sample_relative(self, study: optuna.Study, *_: Any) -> dict[str, Any]:
            self.seen.append([t.number for t in study.get_trials(states=(TrialState.COMPLETE,))])
            return self.POINT

    study = made(
        StableCmaEsSampler(
            SPACE, seed=5, injected=RepeatableSampler(lambda _: Counting(), list(SPACE), seed=5, n_latest=3)
        )
    )
    study.optimize(objective, 11)
    assert Counting.seen == [[], [2, 3, 4], [7, 8, 9]]


def test_no_trial_is_random() -> None:
    sampler = StableCmaEsSampler(SPACE, seed=5)
    study = made(sampler)
    study.optimize(objective, 3 * POPSIZE)
    assert [generation(trial) for trial in study.trials] == [0] * POPSIZE + [1] * POPSIZE + [2] * POPSIZE
    narrow = StableCmaEsSampler(SPACE, seed=5, covariance=np.eye(4) * 1e-12)
    study = made(narrow)
    first = suggest(study.ask())
    assert first == pytest.approx({"a": 0, "b": 5, "c": 0.6, "d": 0}, abs=1e-3)  # the mean, not anywhere


def test_it_finds_the_bottom_of_a_bowl_better_than_chance() -> None:
    ours = made()
    ours.optimize(objective, 120)
    random = made(optuna.samplers.RandomSampler(seed=5))
    random.optimize(objective, 120)
    assert ours.best_value < 0.002
    assert ours.best_value < random.best_value / 10


def test_maximizing_is_minimizing_the_negative() -> None:
    down, up = made(direction="minimize"), made(direction="maximize")
    down.optimize(objective, 30)
    up.optimize(lambda trial: -objective(trial), 30)
    assert points(up) == points(down)


def test_seeds_differ_and_repeat() -> None:
    studies = [made(StableCmaEsSampler(SPACE, seed=seed)) for seed in (1, 1, 2)]
    for study in studies:
        study.optimize(objective, 2 * POPSIZE)
    assert points(studies[0]) == points(studies[1])
    assert all(a != b for a, b in zip(points(studies[0]), points(studies[2]), strict=True))
    assert len({trial.params["a"] for trial in studies[0].trials}) == 2 * POPSIZE


@pytest.mark.parametrize("order", [["d", "c", "b", "a"], ["c", "a", "d", "b"]])
def test_order_does_not_matter(order: list[str]) -> None:
    covariance = np.diag([0.01, 0.02, 0.03, 0.04])
    permutation = [list(SPACE).index(name) for name in order]
    expected = made(StableCmaEsSampler(SPACE, seed=5, covariance=covariance))
    expected.optimize(objective, 20)
    shuffled = StableCmaEsSampler(
        {name: SPACE[name] for name in order}, seed=5, covariance=covariance[np.ix_(permutation, permutation)]
    )
    study = made(shuffled)
    study.optimize(lambda trial: loss(suggest(trial, order)), 20)
    assert points(study) == points(expected)


def test_workers_with_one_seed_draw_different_points() -> None:
    storage = optuna.storages.InMemoryStorage()
    workers = [
        made(StableCmaEsSampler(SPACE, seed=5), storage=storage, study_name="shared", load_if_exists=True)
        for _ in range(3)
    ]
    trials = [worker.ask() for worker in workers]
    assert len({suggest(trial)["a"] for trial in trials}) == 3


def test_the_process_s_random_state_is_neither_used_nor_moved() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    study = made()
    study.optimize(objective, 10)
    assert np.random.get_state()[1].tolist() == state
    again = made()
    again.sampler.reseed_rng()
    np.random.seed(1)
    again.optimize(objective, 10)
    assert points(again) == points(study)


# --- the first generation


def first_generation(n: int, **options: Any) -> np.ndarray:
    """``n`` points of the first generation in [0, 1], shape ``[n, 2]``."""
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(-2, 2)}
    study = made(StableCmaEsSampler(space, seed=3, popsize=2 * n, **options))
    trials = [study.ask() for _ in range(n)]
    return np.array([[t.suggest_float("x", 0, 1), (t.suggest_float("y", -2, 2) + 2) / 4] for t in trials])


def test_the_first_generation_follows_the_covariance() -> None:
    covariance = np.array([[0.01, 0.0032], [0.0032, 0.0016]])  # standard deviations 0.1 and 0.04, correlation 0.8
    drawn = first_generation(400, covariance=covariance)
    np.testing.assert_allclose(drawn.mean(axis=0), [0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, rtol=0.25)


def test_without_a_covariance_the_first_step_is_a_sixth_of_each_range() -> None:
    drawn = first_generation(400)
    np.testing.assert_allclose(drawn.std(axis=0), [1 / 6, 1 / 6], rtol=0.15)


def test_a_start_at_a_bound_is_moved_one_and_a_half_deviations_inside() -> None:
    drawn = first_generation(400, covariance=np.diag([0.01, 0.0004]), start={"x": 0.0, "y": 2.0})
    # Means 0.15 and 1 - 0.03; what is cut at the bound 1.5 deviations away moves them by another 0.139 deviations.
    np.testing.assert_allclose((drawn.mean(axis=0) - [0.15, 0.97]) / [0.1, 0.02], [0.139, -0.139], atol=0.15)
    assert drawn.min() > 0
    assert drawn.max() < 1


def test_a_step_too_wide_for_that_starts_in_the_middle() -> None:
    drawn = first_generation(300, covariance=np.eye(2) * 0.16, start={"x": 0.0, "y": -2.0})
    np.testing.assert_allclose(drawn.mean(axis=0), [0.5, 0.5], atol=0.06)


def test_the_start_may_be_a_function_of_the_study() -> None:
    seen: list[optuna.Study] = []

    def start(study: optuna.Study) -> Mapping[str, float]:
        seen.append(study)
        return {"a": 0.5, "b": 2.0, "c": 0.6, "d": -1.0, "not searched": 3.0}

    study = made(StableCmaEsSampler(SPACE, seed=5, start=start, covariance=np.eye(4) * 1e-12))
    assert seen == []  # the baselines are not scored yet
    first = suggest(study.ask())
    assert first == pytest.approx({"a": 0.5, "b": 2.0, "c": 0.6, "d": -1.0}, abs=1e-3)
    assert seen == [study]


# --- which trials are told


def run(steps: Callable[[optuna.Study, optuna.Trial], Any], n_trials: int, study: optuna.Study | None = None) -> Any:
    study = study or made()
    while len(study.trials) < n_trials:
        steps(study, study.ask())
    return study


def pruned_with(estimate: float | None, number: int = 2) -> Callable[[optuna.Study, optuna.Trial], None]:
    """Trial ``number`` is pruned, with or without an estimate of its value; the others are complete."""

    def step(study: optuna.Study, trial: optuna.Trial) -> None:
        params = suggest(trial)
        if trial.number != number:
            study.tell(trial, loss(params))
            return
        trial.report(123.0, step=0)
        if estimate is not None:
            trial.set_user_attr(PAIRED_ESTIMATE, estimate)
        study.tell(trial, state=TrialState.PRUNED)

    return step


def complete_with(value: float, number: int = 2) -> Callable[[optuna.Study, optuna.Trial], None]:
    def step(study: optuna.Study, trial: optuna.Trial) -> None:
        params = suggest(trial)
        study.tell(trial, value if trial.number == number else loss(params))

    return step


def test_a_pruned_trial_counts_with_its_paired_estimate() -> None:
    n = 2 * POPSIZE
    study = run(pruned_with(-1.0), n)
    assert study.trials[2].state == TrialState.PRUNED
    assert points(study) == points(run(complete_with(-1.0), n))
    other = run(pruned_with(5.0), n)
    assert points(other)[:POPSIZE] == points(study)[:POPSIZE]
    assert all(a != b for a, b in zip(points(other)[POPSIZE:], points(study)[POPSIZE:], strict=True))
    # The best of its generation pulls the next one towards it, the worst does not.
    here = np.array(list(study.trials[2].params.values()))

    def distance(study: optuna.Study) -> float:
        scale = np.array([d.high - d.low for d in SPACE.values()])
        later = np.array([list(point.values()) for point in points(study)[POPSIZE:]])
        return float(np.linalg.norm((later.mean(axis=0) - here) / scale))

    assert distance(study) < distance(other)
    # The record itself is as it was.
    assert study.trials[2].value == 123.0


def test_pruned_without_an_estimate_and_failed_trials_are_ignored() -> None:
    def failed(study: optuna.Study, trial: optuna.Trial) -> None:
        params = suggest(trial)
        if trial.number == 2:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, loss(params))

    study = run(pruned_with(None), 2 * POPSIZE)
    generations = [generation(trial) for trial in study.trials]
    assert generations == [0] * (POPSIZE + 1) + [1] * (POPSIZE - 1)
    assert points(run(failed, 2 * POPSIZE)) == points(study)


def test_the_generation_survives_the_loss_of_the_trial_that_holds_the_state() -> None:
    """Optuna keeps the optimizer in the first trial of a generation, which may fail."""
    study = run(pruned_with(None, number=POPSIZE), 3 * POPSIZE + 1)
    generations = [generation(trial) for trial in study.trials]
    assert generations == [0] * POPSIZE + [1] * (POPSIZE + 1) + [2] * POPSIZE


def test_enqueued_trials_are_not_told_and_take_no_place() -> None:
    corner = {name: d.high for name, d in SPACE.items()}

    def with_baseline(value: float) -> optuna.Study:
        study = made()
        study.enqueue_trial(corner)
        return run(complete_with(value, number=0), 2 * POPSIZE + 1, study)

    study = with_baseline(-100.0)
    assert points(study)[0] == corner
    assert [generation(trial) for trial in study.trials] == [None] + [0] * POPSIZE + [1] * POPSIZE
    assert points(with_baseline(100.0)) == points(study)


def test_what_an_enqueued_trial_leaves_open_is_drawn_repeatably_and_not_told() -> None:
    def draw(n_drawn_before: int) -> dict[str, float]:
        sampler = StableCmaEsSampler(SPACE, seed=5)
        other = made(sampler)
        for _ in range(n_drawn_before):
            other.ask().suggest_float("not searched", 0, 1)
        study = made(sampler)
        study.enqueue_trial({"a": 0.5})
        params = suggest(study.ask())
        assert generation(study.trials[0]) is None
        return params

    assert draw(0)["a"] == 0.5
    assert draw(3) == draw(0)


# --- spaces of all sizes, and bad arguments


@pytest.mark.parametrize(("n", "popsize"), [(1, 4), (2, 6), (12, 11), (40, 15)])
def test_generations_have_the_standard_size(n: int, popsize: int) -> None:
    space = {f"x{i:02d}": FloatDistribution(0, 1) for i in range(n)}
    sampler = StableCmaEsSampler(space, seed=0)
    assert sampler.population_size == popsize
    study = made(sampler)
    study.optimize(lambda t: sum((t.suggest_float(name, 0, 1) - 0.2) ** 2 for name in space), 2 * popsize + 1)
    generations = [generation(trial) for trial in study.trials]
    assert generations == [0] * popsize + [1] * popsize + [2]


def test_popsize_can_be_given() -> None:
    sampler = StableCmaEsSampler(SPACE, seed=0, popsize=5)
    assert sampler.population_size == 5
    study = made(sampler)
    study.optimize(objective, 11)
    assert [generation(trial) for trial in study.trials] == [0] * 5 + [1] * 5 + [2]


def test_a_range_of_one_point_is_no_dimension() -> None:
    space = {"a": FloatDistribution(0, 1), "b": FloatDistribution(0, 1), "still": FloatDistribution(2, 2)}
    sampler = StableCmaEsSampler(space, seed=0, covariance=np.diag([0.04, 0.0001, 1.0]), start={"a": 0.3, "b": 0.6})
    assert sampler.population_size == 6
    study = made(sampler)

    def objective(trial: optuna.Trial) -> float:
        return sum(trial.suggest_float(name, d.low, d.high) for name, d in space.items())

    study.optimize(objective, 7)
    assert [trial.params["still"] for trial in study.trials] == [2.0] * 7
    assert generation(study.trials[6]) == 1
    assert np.std([trial.params["b"] for trial in study.trials]) < 0.05


def test_nothing_to_search() -> None:
    study = made(StableCmaEsSampler({}, seed=0))
    study.optimize(lambda trial: 1.0, 3)
    assert points(study) == [{}] * 3


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        ({"n": IntDistribution(0, 3)}, {}, r"search_space\['n'\] must be a plain FloatDistribution, got IntDist"),
        ({"x": FloatDistribution(1, 3, log=True)}, {}, r"search_space\['x'\] must be a plain FloatDistribution"),
        ({"x": FloatDistribution(0, 1, step=0.5)}, {}, r"search_space\['x'\] must be a plain FloatDistribution"),
        (
            SPACE,
            {"covariance": np.eye(3)},
            r"covariance must be positive definite of shape \(4, 4\), got shape \(3, 3\)",
        ),
        (SPACE, {"covariance": np.diag([1.0, 1, 1, 0])}, r"covariance must be positive definite of shape \(4, 4\)"),
        (SPACE, {"covariance": np.ones((4, 4)) - np.eye(4)}, r"covariance must be positive definite"),
        (SPACE, {"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        (SPACE, {"seed": 2**32}, r"seed must be in \[0, 2\*\*32\), got 4294967296"),
        (SPACE, {"popsize": 2}, r"popsize must be at least 3, got 2"),
    ],
)
def test_bad_arguments(space: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableCmaEsSampler(space, **{"seed": 0, **options})
