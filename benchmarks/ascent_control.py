"""How much of an ascent's gain needs no sources: the same ascent along random directions.

    python benchmarks/ascent_control.py STUDY_FILE [--seeds N] [--json]

Both ascents begin at the study's best uniform merge (by the searched documents), have as many weights, the same
documents, steps and room for each weight. One moves along the task vectors of the sources. The other one moves along
as many random vectors, drawn from a normal distribution tensor by tensor and scaled to the norms of the task vectors.
What it gains is what as many weights learn from the searched documents without any source; what it gains on held-out
documents, too, is no overfitting, but no source has contributed to it. The rest is what the sources know.

The study file needs ``task_arithmetic``, a searched ``weight`` and a holdout; ``study.seed`` becomes 0, 1, ... in turn.
An ascent takes as long as some ten full evaluations. The models of the control are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

from optuna_merge.checkpoints.write import write_checkpoint
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.objective import MergeObjective


@dataclass(frozen=True)
class Scores:
    """Scores of one merge."""

    searched: float
    held_out: float

    def __sub__(self, other: Scores) -> Scores:
        return Scores(self.searched - other.searched, self.held_out - other.held_out)


@dataclass(frozen=True)
class Comparison:
    """One seed.

    Attributes:
        start: Where both ascents begin.
        sources: What the ascent along the sources' task vectors gains.
        random: What the ascent along random vectors gains.
    """

    start: Scores
    sources: Scores
    random: Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="study file")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(options.file, seed, Path(folder)))
        print(f"seed {seed}: {line(found[-1:])}", file=sys.stderr)
    print(json.dumps([asdict(one) for one in found]) if options.json else line(found))


def compare(file: Path, seed: int, folder: Path) -> Comparison:
    """Run both ascents for one seed."""
    settings = {"study.seed": seed, "storage_path": str(folder / "sources"), "search.start": "ascent"}
    with closing(MergeObjective.from_file(file, settings)) as objective:
        if objective.config.genome.merge_method != "task_arithmetic" or not objective.scorer.holdout:
            raise SystemExit(f"{file}: must have merge_method task_arithmetic and a holdout; set them")
        bounds = objective.space.bounds["weight"]
        uniform = [one for one in objective.space.baselines if one.kind == "uniform"]
        scored = [scores_of(objective, objective.space.baseline_recipe(one.name)) for one in uniform]
        best = int(np.argmax([scores.searched for scores in scored]))
        start, weight = scored[best], next(iter(uniform[best].params.values()))
        models = write_control(objective, objective.space.baseline_recipe(uniform[best].name), seed, folder)
    ranged = {"low": bounds.low, "high": bounds.high, "start": weight}
    along_sources = climb(file, {**settings, "search.weight": ranged})
    control = {
        **settings,
        "storage_path": str(folder / "random"),
        "genome.base_model": str(models[0]),
        "genome.models": [str(model) for model in models[1:]],
        "genome.tokenizer_source": None,
        "genome.allow_negative_weights": True,
        "search.weight": {"low": bounds.low - weight, "high": bounds.high - weight, "start": 0.0},
    }
    return Comparison(start, along_sources - start, climb(file, control) - start)


def climb(file: Path, settings: dict[str, Any]) -> Scores:
    """The scores at the end of an ascent."""
    with closing(MergeObjective.from_file(file, settings)) as objective:
        study = optuna.create_study(direction="maximize")
        objective.ascend(study)
        study.optimize(objective, n_trials=1)
        return scores_of(objective, objective.recipe(study.trials[0], study))


def scores_of(objective: MergeObjective, recipe: Recipe) -> Scores:
    objective.load(recipe)
    assert objective.scorer.holdout is not None
    return Scores(objective.scorer.score_all().value, objective.scorer.holdout.score().value)


def write_control(objective: MergeObjective, start: Recipe, seed: int, folder: Path) -> list[Path]:
    """Write the start as a model, and for each source the start plus a random vector.

    Returns:
        The start's folder, then the others.
    """
    assert isinstance(objective.loader, LocalLoader)
    merger, space = objective.loader.merger, objective.space
    sources = [space.baseline_recipe(one.name) for one in space.baselines if one.kind == "source"]
    [base] = [space.baseline_recipe(one.name) for one in space.baselines if one.kind == "base"]
    written = []
    for number, source in enumerate([None, *sources]):
        target = folder / ("start" if source is None else f"random_{number}")
        target.mkdir()
        made = merger.merge(start) if source is None else beside(merger, start, base, source, (seed, number))
        write_checkpoint(target, made)
        merger.template(start).write_description(target, start.dtype, copy_code=True)
        written.append(target)
    return written


def beside(
    merger: Merger, start: Recipe, base: Recipe, source: Recipe, key: tuple[int, int]
) -> Iterator[tuple[str, Tensor]]:
    """The start plus a random vector that is as long as the source's task vector, in each tensor."""
    for (name, at), (_, theirs), (_, ours) in zip(*map(merger.merge, (start, base, source)), strict=True):
        length = (ours.float() - theirs.float()).norm()
        digest = hashlib.sha256(f"{key} {name}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        vector = torch.randn(at.shape, generator=random).to(at.device)
        yield name, (at.float() + vector * (length / vector.norm())).to(at.dtype)


def line(found: list[Comparison]) -> str:
    """The means over seeds, in words."""
    start, sources, random = (
        [np.mean([getattr(getattr(one, kind), side) for one in found]) for side in ("searched", "held_out")]
        for kind in ("start", "sources", "random")
    )
    return (
        f"from {start[0]:.3f} searched, {start[1]:.3f} held out: along the sources {sources[0]:+.3f} and"
        f" {sources[1]:+.3f}, along random directions {random[0]:+.3f} and {random[1]:+.3f}"
    )


if __name__ == "__main__":
    main()
