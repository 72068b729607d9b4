"""What a search finds with a budget of documents: our samplers and pruners, and pycma as mergekit-evolve uses it.

    python benchmarks/search_quality.py [--landscape NAME] [--seeds N] [--arms NAME ...] [--quick] [--json]

Every search has the same budget: the documents that pycma scores in 100 merges. Baselines and pruned trials count
with the documents that they scored, an ascent with those that could have been scored in its time. All searches go
through ``MergeObjective``, with the sampler and pruner that a study file selects. The final score is the *true* score
of the merge that the search would hand over: on the quickstart over all documents, searched and held out; on the
synthetic landscapes over a population that no search sees.

``quickstart``: real merges of its models; left out unless ``make quickstart-models`` has made them.
``quickstart-60``, ``quickstart-20``: the same with 60 and 20 searched documents a task, and all others held out; only
on demand. An arm that begins with an ascent also shows its price, in full evaluations, and the score at its end.
``synthetic-12``, ``synthetic-48``: three sources of 4 and 16 layers, with one weight for each source and layer.
Whether a document is passed depends on its difficulty, on how near the weights are to what its task wants (its own
source near 1 and the others near 0, to a degree that varies by layer), and on a random direction in weight space.

pycma: ``fmin2`` from 1/3 with step 1/6, without bounds; negative weights are mirrored, and every merge is scored on
every document.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import yaml

from optuna_merge.config.read import load_study
from optuna_merge.evaluation.results import ChunkResult, Score, TaskScore
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import PASSTHROUGH, Recipe
from optuna_merge.search.space import ModelRefs
from optuna_merge.storage.claims import enqueue
from optuna_merge.storage.trials import best_merge, documents_spent, score_or_worst
from optuna_merge.study.engines import build_scorer, make_engine
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective

ROOT = Path(__file__).resolve().parents[1]
N_MODELS = 3
PEER = "pycma"
DEFAULT = "cmaes, wilcoxon"
METHODS = ("task_arithmetic", "ties", "dare_ties", "della")
"""The methods of the race; the studies' own is the first."""
KINDS = ("searched", "true", "held_out")
QUICKSTARTS = {"quickstart": 200, "quickstart-60": 60, "quickstart-20": 20}
"""Landscape to the searched documents of each task."""


@dataclass(frozen=True)
class Arm:
    """A sampler and a pruner.

    Attributes:
        settings: Dotted key to value; replaces what the study file says.
        needs_models: Whether it is left out on landscapes without models.
    """

    settings: dict[str, Any]
    needs_models: bool = False


def _arms() -> dict[str, Arm]:
    alone = {"name": "cmaes", "gp_every": 0}
    arms = {"cmaes alone, wilcoxon": Arm({"study.sampler": alone, "study.pruner": "wilcoxon"})}
    for name in ("cmaes", "tpe", "gp", "nsga2", "random"):
        for pruner in ("wilcoxon", "none"):
            arms[f"{name}, {pruner}"] = Arm({"study.sampler": name, "study.pruner": pruner})
    for profile in ("tensor", "group"):
        settings = {"search.start": "ascent", "search.profile": profile}
        arms[f"ascent, {profile}"] = Arm(settings, needs_models=True)
    for method in METHODS[1:]:
        arms[method] = Arm({"genome.merge_method": method}, needs_models=True)
    arms["race"] = Arm({"genome.merge_method": list(METHODS)}, needs_models=True)
    return arms


ARMS = _arms()


class Landscape(Protocol):
    """Models and eval tasks, real or synthetic, on which merges are searched."""

    def objective(self, seed: int, folder: Path, settings: dict[str, Any]) -> MergeObjective:
        """The objective of one study on this landscape."""
        ...

    def truth(self, objective: MergeObjective, recipe: Recipe) -> tuple[float, float]:
        """The true score of a merge, and its score on documents that no search sees."""
        ...


@dataclass(frozen=True)
class Step:
    """A new best merge of a search: documents scored so far, its score on the searched ones, true and held out."""

    documents: int
    searched: float
    true: float
    held_out: float


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        steps: Its successive best merges, at least one.
        budget: How many documents it was allowed to score.
        price: Of the ascent that it began with, without scoring its end, in full evaluations; None without one.
    """

    steps: list[Step]
    budget: int
    price: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=ROOT / "studies" / "quickstart_models", metavar="DIR")
    parser.add_argument("--landscape", action="append", choices=[*QUICKSTARTS, "synthetic-12", "synthetic-48"])
    parser.add_argument("--seeds", type=int, default=10, metavar="N")
    parser.add_argument("--merges", type=int, default=100, metavar="N", help="merges of pycma; sets the budget of all")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, PEER], metavar="NAME", help=", ".join([*ARMS, PEER]))
    parser.add_argument("--quick", action="store_true", help="synthetic-12 only, 15 merges, without gp")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    names = options.landscape or ["synthetic-12", "synthetic-48", "quickstart"]
    arms = options.arms or [*ARMS, PEER]
    if options.quick:
        names, options.merges = ["synthetic-12"], 15
        arms = [arm for arm in arms if not arm.startswith("gp")]
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}")
    if QUICKSTARTS.keys() & set(names) and not (options.quickstart / "base" / "config.json").is_file():
        if options.landscape:
            parser.error(f"{options.quickstart} must hold the quickstart's models; run make quickstart-models")
        print("quickstart: left out, because its models have not been made", file=sys.stderr)
        names = [name for name in names if name not in QUICKSTARTS]
    quiet()
    figures = {}
    for name in names:
        is_real = name in QUICKSTARTS
        landscape: Landscape = (
            Quickstart(options.quickstart, QUICKSTARTS[name]) if is_real else Synthetic(int(name[-2:]))
        )
        own = [arm for arm in arms if is_real or arm == PEER or not ARMS[arm].needs_models]
        runs: dict[str, list[Run]] = {arm: [] for arm in own}
        for seed in range(options.seeds):
            for arm in own:
                runs[arm].append(search(landscape, arm, seed, options.merges))
                print(f"{name}, seed {seed}, {arm}: {runs[arm][-1].steps[-1].true:.4f}", file=sys.stderr)
        figures[name] = summary(runs)
        if not options.json:
            report(name, figures[name])
    if options.json:
        print(json.dumps(figures))


def quiet() -> None:
    logging.disable(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


def search(landscape: Landscape, arm: str, seed: int, merges: int) -> Run:
    """Run one study whose budget is the documents of ``merges`` full merges."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"study.n_trials": merges, "search.start": "uniform", **ARMS[arm].settings} if arm != PEER else {}
        objective = landscape.objective(seed, Path(folder), settings)
        budget = merges * objective.scorer.n_documents
        if arm == PEER:
            return Run(pycma(landscape, objective, seed, merges), budget)
        study = optuna.create_study(direction="maximize", sampler=objective.sampler(), pruner=objective.pruner())
        if objective.begins_with_ascent:
            objective.ascend(study)
        objective.enqueue_baselines(study)
        steps: list[Step] = []
        documents = 0
        price = None
        while True:
            trials = study.get_trials(deepcopy=False)
            if all(trial.state != optuna.trial.TrialState.WAITING for trial in trials):
                enqueue(study, objective.plan(trials) or [])
            trial = study.ask()
            try:
                study.tell(trial, objective(trial))
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            documents += round(documents_spent(study.get_trials(deepcopy=False)[trial.number]))
            if trial.number == 0 and objective.config.search.start == "ascent":
                price = documents / objective.scorer.n_documents - 1
            if documents > budget:
                return Run(steps, budget, price)
            best = best_merge(study)
            if best is not None and best.number == trial.number:
                scores = landscape.truth(objective, objective.recipe(best, study))
                steps.append(Step(documents, score_or_worst(best), *scores))


def pycma(landscape: Landscape, objective: MergeObjective, seed: int, merges: int) -> list[Step]:
    """Search as mergekit-evolve does: its start, step and bounds, its call of pycma."""
    import cma

    names = list(objective.space.distributions)
    steps: list[Step] = []
    n_scored = 0

    def scores(genotypes: Sequence[np.ndarray]) -> list[float]:
        nonlocal n_scored
        losses = []
        for genotype in genotypes:
            recipe = objective.space.decode(dict(zip(names, np.abs(genotype).tolist(), strict=True)))
            objective.load(recipe)
            value = objective.scorer.score_all().value
            n_scored += 1
            losses.append(-value)
            if n_scored <= merges and (not steps or value > steps[-1].searched):
                scores = landscape.truth(objective, recipe)
                steps.append(Step(n_scored * objective.scorer.n_documents, value, *scores))
        return losses

    options = {"maxfevals": merges, "seed": seed + 1, "verbose": -9, "verb_log": 0}
    cma.fmin2(None, parallel_objective=scores, x0=np.full(len(names), 1 / N_MODELS), sigma0=1 / 6, options=options)
    return steps


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Final scores of each arm, and the share of the peer's documents that the default needs for the peer's score."""
    result: dict[str, Any] = {"arms": {}}
    finals = {arm: np.array([run.steps[-1].true for run in searches]) for arm, searches in runs.items()}
    reference = finals.get(DEFAULT, next(iter(finals.values())))
    for arm, final in finals.items():
        behind = final - reference
        result["arms"][arm] = {
            "true": float(final.mean()),
            "stderr": standard_error(final),
            "searched": float(np.mean([run.steps[-1].searched for run in runs[arm]])),
            "held_out": float(np.mean([run.steps[-1].held_out for run in runs[arm]])),
            "difference": float(behind.mean()),
            "difference_stderr": standard_error(behind),
        }
        prices = [run.price for run in runs[arm] if run.price is not None]
        if prices:
            ends = [run.steps[0] for run in runs[arm]]
            result["arms"][arm]["ascent"] = {
                "price": float(np.median(prices)),
                **{kind: float(np.mean([getattr(end, kind) for end in ends])) for kind in KINDS},
            }
    if DEFAULT in runs and PEER in runs:
        for kind in ("true", "searched"):
            shares = [share_needed(ours, theirs, kind) for ours, theirs in zip(runs[DEFAULT], runs[PEER], strict=True)]
            result[f"share_{kind}"] = {"median": float(np.median(shares)), "each": shares}
    return result


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def share_needed(ours: Run, theirs: Run, kind: str) -> float:
    """Documents until our best merge is as good as the peer's last, as a share of the peer's; 2 if it never is."""
    wanted = getattr(theirs.steps[-1], kind)
    reached = [step.documents for step in ours.steps if getattr(step, kind) >= wanted]
    return reached[0] / theirs.budget if reached else 2.0


def report(name: str, figures: dict[str, Any]) -> None:
    print(f"{name}: final true score, difference from {DEFAULT} (paired by seed), searched and held-out score")
    for arm, row in figures["arms"].items():
        print(
            f"  {arm:16} {row['true']:.4f} ± {row['stderr']:.4f}   {row['difference']:+.4f} ±"
            f" {row['difference_stderr']:.4f}   {row['searched']:.4f} {row['held_out']:.4f}"
        )
        if "ascent" in row:
            end = row["ascent"]
            print(
                f"    its ascent: price {end['price']:.1f} evaluations, true {end['true']:.4f}, searched"
                f" {end['searched']:.4f}, held out {end['held_out']:.4f}"
            )
    for kind in ("true", "searched"):
        if f"share_{kind}" in figures:
            shares = figures[f"share_{kind}"]
            each = " ".join(f"{share:.3f}" for share in sorted(shares["each"]))
            print(f"  share of {PEER}'s documents for its final {kind} score: median {shares['median']:.3f} ({each})")
    sys.stdout.flush()


class Quickstart:
    """Real merges of the quickstart's models, scored with transformers.

    Args:
        models: Their folder.
        n_searched: Documents of each task that are searched; all others are held out.
    """

    N_DOCUMENTS = 400

    def __init__(self, models: Path, n_searched: int) -> None:
        self._share = n_searched / self.N_DOCUMENTS
        self._genome = {
            "holdout": 1 - self._share,
            "genome.models": [str(models.resolve() / skill) for skill in ("reverse", "next", "last")],
            "genome.base_model": str(models.resolve() / "base"),
        }
        self._seed: int | None = None

    def objective(self, seed: int, folder: Path, settings: dict[str, Any]) -> MergeObjective:
        file = ROOT / "optuna_merge" / "quickstart" / "quickstart.yaml"
        config = load_study(file, {**self._genome, "study.seed": seed, "storage_path": str(folder), **settings})
        if self._seed is None:
            self._models = StudyModels.open(config)
            self._loader = LocalLoader(Merger(self._models.views, device="cpu"), make_engine(config, self._models))
        if self._seed != seed:
            self._scorer = build_scorer(config, self._loader.engine)
            self._seed = seed
        return MergeObjective(config, self._models, self._loader, self._scorer)

    def truth(self, objective: MergeObjective, recipe: Recipe) -> tuple[float, float]:
        """The means over all documents and over the holdout."""
        objective.load(recipe)
        searched, held_out = objective.scorer.score_all().value, objective.scorer.holdout.score().value
        return self._share * searched + (1 - self._share) * held_out, held_out


class SyntheticModels(StudyModels):
    """Sources that have names and no files."""

    @property
    def contents(self) -> dict[str, str]:  # type: ignore[override]
        return {name: name for name in (*self.refs.sources, self.refs.base or "")}


class Synthetic:
    """Three sources whose weights decide which documents are passed.

    The curvatures and documents are drawn from the seed. In layer ``l`` task ``k`` loses
    ``h[l] * ((w[l, k] - t[l, k])**2 + sum_j r[l, k, j] * w[l, j]**2)``; a document of the task is passed if
    ``LEVEL - STEEPNESS * loss + its bias + its direction . w`` is above 0.
    """

    LEVEL, STEEPNESS, N_DOCUMENTS, N_CHUNKS, N_POPULATION = 4.0, 7.0, 200, 20, 5000

    def __init__(self, n_dimensions: int) -> None:
        self._n_layers = n_dimensions // N_MODELS

    def objective(self, seed: int, folder: Path, settings: dict[str, Any]) -> MergeObjective:
        genome = {
            "models": [f"./expert_{k}" for k in range(N_MODELS)],
            "base_model": "./base",
            "merge_method": "task_arithmetic",
            "layer_granularity": 1,
        }
        path = folder / "synthetic.yaml"
        path.write_text(yaml.safe_dump({"genome": genome, "tasks": ["one", "two", "three"]}))
        config = load_study(path, {"study.seed": seed, "search.weight": [0.0, 1.5], **settings})
        refs = ModelRefs(config.sources, "./base", self._n_layers, "float32")
        model = SyntheticModel(self._n_layers, seed)
        scorer: Any = SyntheticScorer(model, [f"task_{k}" for k in range(N_MODELS)])
        return MergeObjective(config, SyntheticModels(refs, {}, {}, ()), model, scorer)

    def truth(self, objective: MergeObjective, recipe: Recipe) -> tuple[float, float]:
        objective.load(recipe)
        scorer: Any = objective.scorer
        passed = float(scorer.model.passed(scorer.model.population).mean())
        return passed, passed


@dataclass(frozen=True)
class SyntheticDocuments:
    """Documents of every task: ``bias [n_tasks, n]`` and ``direction [n_tasks, n, n_dimensions]``."""

    bias: np.ndarray
    direction: np.ndarray


class SyntheticModel:
    """A loader whose resident model is the recipe's weights themselves."""

    device = "cpu"

    def __init__(self, n_layers: int, seed: int) -> None:
        rng = np.random.default_rng([seed, n_layers])
        shape = (n_layers, N_MODELS)
        importance = rng.gamma(2.0, size=n_layers)
        self._importance = importance / importance.sum()
        self._wanted = rng.normal(1.0, 0.2, size=shape)
        others = 1 - np.eye(N_MODELS)
        self._interference = others * rng.uniform(0.05, 0.55, size=(n_layers, N_MODELS, N_MODELS))
        self.searched = self._draw(rng, Synthetic.N_DOCUMENTS)
        self.population = self._draw(rng, Synthetic.N_POPULATION)
        self._weights = np.zeros(shape)

    def _draw(self, rng: np.random.Generator, n: int) -> SyntheticDocuments:
        n_dimensions = self._wanted.size
        direction = rng.normal(size=(N_MODELS, n, n_dimensions)) / np.sqrt(n_dimensions)
        return SyntheticDocuments(rng.logistic(size=(N_MODELS, n)), 2.0 * direction)

    def load(self, recipe: Recipe) -> None:
        """Keep the weights of a recipe, ``[n_layers, n_models]``; a source as it stands has weight 1."""
        if recipe.method == PASSTHROUGH:
            [reference] = recipe.models
            number = reference.partition("_")[2]
            row = [float(number == str(k)) for k in range(N_MODELS)]
            self._weights = np.tile(row, (len(self._wanted), 1))
        else:
            self._weights = np.array([group.parameter_sets[0].per_model["weight"] for group in recipe.groups])

    def close(self) -> None: ...

    def passed(self, documents: SyntheticDocuments) -> np.ndarray:
        """Which documents the loaded weights pass, ``[n_tasks, n]``."""
        w = self._weights
        own = (w - self._wanted) ** 2  # [n_layers, n_tasks]
        interference = np.einsum("lkj,lj->lk", self._interference, w**2)
        loss = self._importance @ (own + interference)  # [n_tasks]
        level = Synthetic.LEVEL - Synthetic.STEEPNESS * loss
        return level[:, None] + documents.bias + documents.direction @ (w.ravel() - 0.6) > 0


class SyntheticScorer:
    """Stands in for the eval tasks: serves the searched documents in chunks."""

    n_chunks = Synthetic.N_CHUNKS
    not_means = ()
    holdout = None
    judge = None

    def has_gradient(self, *, by_another_engine: bool = False) -> bool:
        return False

    def __init__(self, model: SyntheticModel, tasks: Sequence[str]) -> None:
        self.model = model
        self._tasks = tasks
        self.n_documents = model.searched.bias.size

    def score_chunk(self, chunk: int) -> ChunkResult:
        passed = self.model.passed(self.model.searched)[:, chunk :: self.n_chunks]
        ids = list(range(chunk, Synthetic.N_DOCUMENTS, self.n_chunks))
        rows = zip(self._tasks, passed.astype(float).tolist(), strict=True)
        return ChunkResult(chunk, float(passed.mean()), {task: {"doc_id": ids, "acc,none": row} for task, row in rows})

    def total(self, results: Sequence[ChunkResult], *, stderr: bool = False) -> Score:
        value = float(np.mean([result.score for result in results]))
        return Score(value, {"mean": TaskScore("acc,none", value, None, self.n_documents, 1.0)}, {})

    def score_all(self) -> Score:
        return self.total([self.score_chunk(chunk) for chunk in range(self.n_chunks)])


if __name__ == "__main__":
    main()
