"""The difference of two models on the same documents, by hand and in simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from optuna_merge.evaluation import difference
from optuna_merge.evaluation.difference import Difference, sign_flip_p
from optuna_merge.evaluation.results import ChunkResult, Score
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from tests.evaluation.task_files import MEAN, fake, loaded, write_task

HELPERS = """
def process(doc, results):
    return {"won": 0.0, "average": 0.0, "highest": 0.0}

def average(values):
    return sum(values) / len(values)
"""
OWN_METRICS = """
process_results: !function helpers.process
metric_list:
- {metric: won, aggregation: mean, higher_is_better: true}
- {metric: average, aggregation: !function helpers.average, higher_is_better: true}
"""
NORMED = [{"metric": "acc_norm", **MEAN}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of 30 documents: ``first``, ``second``, ``normed`` without ``acc``, and ``own`` with metrics of its own."""
    folder = tmp_path_factory.mktemp("difference")
    (folder / "helpers.py").write_text(HELPERS)
    choices: dict[str, Any] = {"n_documents": 30, "doc_to_choice": ["right", "wrong"], "doc_to_target": 0}
    write_task(folder, "first", tag=["mixed"], **choices)
    write_task(folder, "second", **choices)
    write_task(folder, "normed", tag=["mixed"], metric_list=NORMED, **choices)
    write_task(folder, "own", verbatim=OWN_METRICS, **choices)
    group = "group: pair\ntask: [first, normed]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "pair.yaml").write_text(group)
    return folder


def build(tasks: Path, *terms: EvalTask) -> Scorer:
    return fake(tasks, terms=list(terms), n_chunks=1)[1]


def scored(scorer: Scorer, **columns: dict[str, Sequence[Any]]) -> Score:
    """The score of a model with these values: lm-eval task to metric to its documents' values."""
    documents = {
        task: {"doc_id": [*range(len(next(iter(values.values()))))], **{f"{m},none": [*v] for m, v in values.items()}}
        for task, values in columns.items()
    }
    return scorer.total([ChunkResult(0, 0.0, documents)])


def enumerated(shares: Sequence[float]) -> float:
    """The share of all combinations of signs whose sum is as large as the observed one."""
    sums = [abs(math.fsum(map(math.prod, zip(shares, signs, strict=True)))) for signs in signs_of(len(shares))]
    return sum(total >= abs(math.fsum(shares)) - 1e-9 for total in sums) / len(sums)


def signs_of(n: int) -> list[tuple[int, ...]]:
    return [*itertools.product([1, -1], repeat=n)]


# --- the sign-flip test


@pytest.mark.parametrize(
    ("shares", "p"),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([0.3], 1.0),
        ([1, 1, 1, 1, 1], 2 / 32),  # the exact sign test
        ([1, 1, 1, 1, 1, 0, 0, 0], 2 / 32),  # documents with equal results say nothing
        ([1, 1, 1, -1], 10 / 16),  # 2 combinations sum to +-4, 8 to +-2
        ([2, 1, 1], 2 / 8),
        ([2, 1, -1], 6 / 8),  # +-4: 2 combinations, +-2: 4
        ([0.2, 0.1, 0.1], 2 / 8),
        ([-2, -1, 1], 6 / 8),
        ([1, -1], 1.0),
    ],
)
def test_p_by_hand(shares: list[float], p: float) -> None:
    assert sign_flip_p(shares) == pytest.approx(p)


def test_p_is_that_of_all_combinations() -> None:
    rng = np.random.default_rng(3)
    for n in range(1, 13):
        shares = rng.normal(0.3, 1, n)
        assert sign_flip_p(shares) == pytest.approx(enumerated(shares))
        shares = rng.integers(-2, 3, n) / 7
        assert sign_flip_p(shares) == pytest.approx(enumerated(shares))


def test_p_is_scipys() -> None:
    rng = np.random.default_rng(4)
    for n_won, n_lost in ((9, 1), (30, 12), (700, 500), (1050, 1000)):
        shares = [0.25 / 2050] * n_won + [-0.25 / 2050] * n_lost
        assert sign_flip_p(shares) == pytest.approx(binomtest(n_won, n_won + n_lost).pvalue, rel=1e-9)
    shares = rng.normal(0.4, 1, 12)
    theirs = permutation_test((shares,), np.sum, permutation_type="samples", vectorized=False, n_resamples=10_000)
    assert sign_flip_p(shares) == pytest.approx(theirs.pvalue)


def test_the_three_ways_to_compute_p_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 documents of two sizes: exactly, by random combinations, and by the normal approximation."""
    shares = np.array([0.01] * 95 + [-0.01] * 70 + [0.005] * 80 + [-0.005] * 55)
    exact = sign_flip_p(shares)
    monkeypatch.setattr(difference, "_MOST_SUMS", 1)
    normal = sign_flip_p(shares)
    monkeypatch.setattr(difference, "_MANY", 1e9)
    drawn = sign_flip_p(shares)
    assert 0.005 < exact < 0.05
    assert normal == pytest.approx(exact, rel=0.1)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 99_999))
    assert drawn == sign_flip_p(shares)
    assert sign_flip_p(np.arange(1, 30)) == 1 / 100_000  # all won: no random combination is as large, this one counts


def test_many_documents_are_quick_and_small_p_values_stay_small() -> None:
    assert 0 < sign_flip_p([0.1] * 60) == pytest.approx(2.0**-59)
    many = np.random.default_rng(0).exponential(size=20_000)
    assert sign_flip_p(many) < 1e-9
    assert sign_flip_p(many * np.resize([1, -1], 20_000)) > 1e-3


@pytest.mark.parametrize("n", [5, 8, 12, 40])
def test_p_values_are_calibrated(n: int) -> None:
    """Under the null hypothesis a p-value of at most a comes with probability a; a z test says 0.05 far too often."""
    rng = np.random.default_rng(n)
    n_studies = 2000
    studies = rng.normal(size=(n_studies, n)) * rng.exponential(size=n)  # documents of different weight
    p_values = np.array([sign_flip_p(shares) for shares in studies[: 100 if n == 40 else None]])
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        possible = math.floor(level * 2 ** (n - 1)) / 2 ** (n - 1)  # p-values of n shares are multiples of 2^(1 - n)
        error = math.sqrt(possible * (1 - possible) / len(p_values))
        assert np.mean(p_values <= level + 1e-9) == pytest.approx(possible, abs=4 * error + 1e-9), level
    if n == 5:
        z = np.abs(studies.mean(axis=1)) / (studies.std(axis=1, ddof=1) / math.sqrt(n))
        assert np.mean(z > 1.96) > 0.09  # what was done before


@pytest.mark.parametrize("n", [6, 15])
def test_p_values_of_accuracies_are_never_too_small(n: int) -> None:
    """Two tasks of n documents and three metrics, two of one task; equal results are common."""
    rng = np.random.default_rng(n)
    p_values = []
    for _ in range(1500):
        skill = rng.uniform(0.3, 0.9, (2, 1, n))
        won = (rng.random((2, 2, n)) < skill).astype(float)  # [task, model, document]
        normed = np.where(rng.random((2, n)) < 0.7, won[0], rng.random((2, n)) < 0.5)
        shares = 0.5 * (won[0, 0] - won[0, 1]) / n + 0.2 * (normed[0] - normed[1]) / n
        p_values.append(sign_flip_p([*shares, *(0.3 * (won[1, 0] - won[1, 1]) / n)]))
    for level in (0.01, 0.05, 0.1, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) <= level + 3 * math.sqrt(level * (1 - level) / 1500)
    assert np.mean(np.array(p_values) <= 0.2) > 0.1  # and the test is not merely shy


# --- models


def test_five_documents_that_one_model_won(tasks: Path) -> None:
    scorer = build(tasks, EvalTask("first"))
    ours, theirs = scored(scorer, first={"acc": [1.0] * 5}), scored(scorer, first={"acc": [0.0] * 5})
    assert scorer.paired_difference(ours, theirs) == Difference(1.0, 0.0, 0.0625)
    assert scorer.paired_difference(theirs, ours) == Difference(-1.0, 0.0, 0.0625)
    assert scorer.paired_difference(ours, ours) == Difference(0.0, 0.0, 1.0)


WON = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
LOST = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
"""Differences of 1, 0, 1, -1, 1, 1: mean 1/2, sample variance 0.7."""


def test_two_metrics_of_one_task_are_one_observation(tasks: Path) -> None:
    terms = EvalTask("first", 0.25, "acc"), EvalTask("first", 0.25, "acc_norm")
    scorer = build(tasks, *terms)
    ours = scored(scorer, first={"acc": WON, "acc_norm": WON})
    theirs = scored(scorer, first={"acc": LOST, "acc_norm": LOST})
    found = scorer.paired_difference(ours, theirs)
    assert found.value == pytest.approx(0.25)
    assert found.stderr == pytest.approx(0.5 * math.sqrt(0.7 / 6))  # not 0.25 * sqrt(2 * 0.7 / 6)
    assert found.p_value == pytest.approx(12 / 32)  # five documents differ, one of them the other way round
    scorer = build(tasks, terms[1], EvalTask("first", -0.25, "acc"))
    found = scorer.paired_difference(
        scored(scorer, first={"acc": WON, "acc_norm": WON}), scored(scorer, first={"acc": LOST, "acc_norm": LOST})
    )
    assert found == Difference(0.0, 0.0, 1.0)


def test_a_task_in_two_terms_counts_once_for_each_document(tasks: Path) -> None:
    """The group is the task itself and one without the metric; so each document has 0.3 + 0.5 of its difference."""
    scorer = build(tasks, EvalTask("first", 0.3), EvalTask("pair", 0.5))
    empty = {"acc_norm": [1.0] * 6}
    ours, theirs = (scored(scorer, first={"acc": won}, normed=empty) for won in (WON, LOST))
    found = scorer.paired_difference(ours, theirs)
    assert found.value == pytest.approx(0.8 * 0.5)
    assert found.stderr == pytest.approx(0.8 * math.sqrt(0.7 / 6))


def test_tasks_are_independent(tasks: Path) -> None:
    scorer = build(tasks, EvalTask("first", 0.5), EvalTask("second", -2.0))
    other = [1.0, 0.0, 0.0, 1.0]
    ours = scored(scorer, first={"acc": WON}, second={"acc": [0.0] * 4})
    theirs = scored(scorer, first={"acc": LOST}, second={"acc": other})
    found = scorer.paired_difference(ours, theirs)
    assert found.value == pytest.approx(0.5 * 0.5 + 2.0 * 0.5)
    assert found.stderr == pytest.approx(math.sqrt(0.25 * 0.7 / 6 + 4 * (1 / 3) / 4))
    shares = [0.5 * (a - b) / 6 for a, b in zip(WON, LOST, strict=True)] + [2.0 * value / 4 for value in other]
    assert found.p_value == pytest.approx(enumerated([share for share in shares if share]))


@pytest.mark.parametrize("name", ["mixed", "pair"])
def test_a_tag_and_a_group_of_which_one_task_lacks_the_metric(tasks: Path, name: str) -> None:
    engine, scorer = fake(tasks, terms=[EvalTask(name)], n_chunks=1, holdout=0.5)
    scores = []
    for distance in (0.3, 1.2):
        loaded(engine, distance)
        scores.append(scorer.holdout.score(stderr=True))
    assert "acc,none" not in scores[0].documents["normed"]
    found = scorer.paired_difference(*scores)
    won = [np.array(score.documents["first"]["acc,none"]) for score in scores]
    assert found.value == np.mean(won[0]) - np.mean(won[1]) > 0
    assert found.stderr == pytest.approx(np.std(won[0] - won[1], ddof=1) / math.sqrt(15))
    assert found.p_value == sign_flip_p(won[0] - won[1])


def test_documents_without_the_metric_are_left_out(tasks: Path) -> None:
    scorer = build(tasks, EvalTask("first"))
    ours = scored(scorer, first={"acc": [*WON, None, None]})
    theirs = scored(scorer, first={"acc": [*LOST, None, None]})
    assert scorer.paired_difference(ours, theirs) == Difference(
        0.5, pytest.approx(math.sqrt(0.7 / 6)), pytest.approx(12 / 32)
    )


def test_one_document_says_nothing(tasks: Path) -> None:
    scorer = build(tasks, EvalTask("first"))
    ours, theirs = scored(scorer, first={"acc": [1.0]}), scored(scorer, first={"acc": [0.0]})
    assert scorer.paired_difference(ours, theirs) == Difference(1.0, math.inf, 1.0)


# --- metrics that are no means


def test_a_metric_that_is_no_mean_is_swapped_and_bootstrapped(tasks: Path) -> None:
    """The average by a function of the task's own, so the formula says what is right."""
    scorer = build(tasks, EvalTask("own", 0.5, "average"))
    assert scorer.not_means == ("own",)
    ours, theirs = scored(scorer, own={"average": WON}), scored(scorer, own={"average": LOST})
    found = scorer.paired_difference(ours, theirs)
    assert found.value == pytest.approx(0.25)
    assert found.p_value == pytest.approx(12 / 32)  # of all 32 combinations of the five documents that differ
    assert found.stderr == pytest.approx(0.5 * math.sqrt(0.7 / 6 * 5 / 6), rel=0.2)  # 200 draws
    assert scorer.paired_difference(ours, theirs) == found
    five = [scored(scorer, own={"average": [value] * 5}) for value in (1.0, 0.0)]
    assert scorer.paired_difference(*five) == Difference(0.5, 0.0, 0.0625)


def test_documents_are_drawn_for_all_terms_of_a_task_at_once(tasks: Path) -> None:
    """A mean and its like by a function: with opposite weights they cancel in every draw and every combination."""
    scorer = build(tasks, EvalTask("own", 0.5, "won"), EvalTask("own", -0.5, "average"), EvalTask("second"))
    flat = {"acc": [1.0] * 4}
    ours, theirs = (scored(scorer, own={"won": won, "average": won}, second=flat) for won in (WON, LOST))
    assert scorer.paired_difference(ours, theirs) == Difference(0.0, pytest.approx(0.0, abs=1e-12), 1.0)
    scorer = build(tasks, EvalTask("own", 0.25, "won"), EvalTask("own", 0.25, "average"), EvalTask("second"))
    ours, theirs = (scored(scorer, own={"won": won, "average": won}, second=flat) for won in (WON, LOST))
    found = scorer.paired_difference(ours, theirs)
    assert found.p_value == pytest.approx(12 / 32)
    assert found.stderr == pytest.approx(0.5 * math.sqrt(0.7 / 6 * 5 / 6), rel=0.2)


def test_swaps_of_many_documents_are_drawn(tasks: Path) -> None:
    rng = np.random.default_rng(5)
    ours = rng.normal(0.35, 1, 40)
    scorer, plain = build(tasks, EvalTask("own", 1.0, "average")), build(tasks, EvalTask("own", 1.0, "won"))
    drawn = scorer.paired_difference(scored(scorer, own={"average": ours}), scored(scorer, own={"average": [0.0] * 40}))
    exact = plain.paired_difference(scored(plain, own={"won": ours}), scored(plain, own={"won": [0.0] * 40}))
    assert drawn.value == pytest.approx(exact.value)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=4 * math.sqrt(exact.p_value / 2500))
    assert drawn.stderr == pytest.approx(exact.stderr, rel=0.2)


def test_a_value_that_is_not_finite(tasks: Path) -> None:
    scorer = build(tasks, EvalTask("own", 1.0, "average"))
    ours, theirs = scored(scorer, own={"average": WON}), scored(scorer, own={"average": [math.inf] * 6})
    assert scorer.paired_difference(ours, theirs) == Difference(-math.inf, math.inf, 1.0)
