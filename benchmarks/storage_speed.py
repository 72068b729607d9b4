"""What a trial costs that neither merges nor scores: drawing it, and the traffic with the study's storage.

    python benchmarks/storage_speed.py [--storage URL] [--dimensions 100] [--trials 500] [--chunks 20]

Prints the milliseconds of the last 50 of so many trials, and their ratio to Optuna's own storage, asked and told by
``study.ask`` and ``study.tell``, with the same sampler and pruner in the same run. Give a PostgreSQL URL for that one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from optuna_merge import store
from optuna_merge.lock import make_lock
from optuna_merge.owners import Claims
from optuna_merge.pruner import SignedRankPruner
from optuna_merge.sampler import StableCmaEsSampler

LAST = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", help="an SQLite file of its own by default")
    parser.add_argument("--dimensions", type=int, default=100)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--chunks", type=int, default=20)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {f"layers_{i:03d}.weight": FloatDistribution(0, 1) for i in range(given.dimensions)}
    with tempfile.TemporaryDirectory() as folder:
        url = given.storage or f"sqlite:///{Path(folder) / 'study.db'}"
        study, storage = store.create_study(url, f"ours {time.time()}")
        prepare(study, space)
        claims = Claims(study, storage, make_lock(storage.backend, study.study_name, store.local_file(url)))
        ours = []
        for _ in range(given.trials):
            start = time.perf_counter()
            claim = claims.next(given.trials)
            assert claim is not None
            with claim:
                claim.tell(evaluate(claim.trial, space, given.chunks), TrialState.COMPLETE)
            ours.append(time.perf_counter() - start)
        plain = optuna.create_study(
            storage=store.open_storage(url), study_name=f"plain {time.time()}", direction="maximize"
        )
        prepare(plain, space)
        theirs = []
        for _ in range(LAST):
            start = time.perf_counter()
            trial = plain.ask()
            plain.tell(trial, evaluate(trial, space, given.chunks))
            theirs.append(time.perf_counter() - start)
    mine, other = (1000 * median(times[-LAST:]) for times in (ours, theirs))
    mean = 1000 * sum(ours[-LAST:]) / LAST
    print(
        f"{store.shown_url(url).partition(':')[0]}, {given.dimensions} dimensions, {given.chunks} chunks: median"
        f" {mine:.0f} ms, mean {mean:.0f} ms of the last {LAST} of {given.trials} trials; Optuna's own storage, first"
        f" {LAST} trials: median {other:.0f} ms; ratio {mine / other:.2f}"
    )


def prepare(study: optuna.Study, space: dict[str, FloatDistribution]) -> None:
    study.sampler, study.pruner = StableCmaEsSampler(space, seed=1), SignedRankPruner()


def evaluate(trial: Any, space: dict[str, FloatDistribution], n_chunks: int) -> float:
    value = -sum((trial.suggest_float(name, d.low, d.high) - 0.3) ** 2 for name, d in space.items())
    trial.set_user_attr(store.RECIPE_DIGEST, "x" * 64)
    for chunk in range(n_chunks):
        trial.report(value, chunk)
        trial.should_prune()
    for key in (store.MERGE_SECONDS, store.EVALUATION_SECONDS, store.DOCUMENTS, "score one", "stderr one"):
        trial.set_user_attr(key, 1.0)
    return float(value)


if __name__ == "__main__":
    main()
