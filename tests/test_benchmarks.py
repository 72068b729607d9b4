"""The search benchmarks run at small sizes, and their arithmetic is right. What they measure is not judged here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from optuna_merge.study.objective import MergeObjective

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_search_quality() -> None:
    command = [sys.executable, str(FOLDER / "search_quality.py"), "--quick", "--seeds", "2", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(ran.stdout)["synthetic-12"]
    assert figures["arms"].keys() >= {"cmaes, wilcoxon", "cmaes, none", "tpe, none", "random, none", "pycma"}
    for row in figures["arms"].values():
        assert 0.4 < row["true"] < 0.95
        assert abs(row["true"] - row["searched"]) < 0.1
    assert 0 < figures["share_true"]["median"] <= 2


def test_the_share_of_documents_by_hand() -> None:
    quality = benchmark("search_quality")
    ours = quality.Run(
        [quality.Step(600, 0.5, 0.6, 0.6), quality.Step(3000, 0.7, 0.65, 0.65), quality.Step(9000, 0.8, 0.75, 0.75)],
        60000,
    )
    theirs = quality.Run([quality.Step(600, 0.4, 0.4, 0.4), quality.Step(30000, 0.75, 0.65, 0.65)], 60000)
    assert quality.share_needed(ours, theirs, "true") == 0.05
    assert quality.share_needed(ours, theirs, "searched") == 0.15
    assert quality.share_needed(theirs, ours, "searched") == 2.0


def test_the_synthetic_landscape_is_worth_what_its_documents_say(tmp_path: Path) -> None:
    quality = benchmark("search_quality")
    landscape = quality.Synthetic(12)
    objective = landscape.objective(1, tmp_path, {})
    assert len(objective.space.distributions) == 12
    totals: dict[str, Any] = {}
    for baseline in objective.space.baselines:
        recipe = objective.space.baseline_recipe(baseline.name)
        objective.load(recipe)
        searched = objective.scorer.score_all().value
        totals[baseline.name], _ = landscape.truth(objective, recipe)
        assert searched == pytest.approx(totals[baseline.name], abs=0.06)
    # Each expert knows only its own task, so a scaled merge of all of them beats each alone.
    assert totals["base"] < totals["expert_0"] < totals["uniform x1.5"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("search_quality", ["--seeds", "1"], "--seeds must be at least 2, got 1"),
        ("search_speed", ["--trials", "5"], "--trials must be at least 20, got 5"),
        ("search_speed", ["--models", "nowhere"], "nowhere must hold the models of the study; run make quickstart"),
    ],
)
def test_arguments_that_cannot_be(
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark(name).main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_control_of_the_ascent_moves_as_far_in_other_directions(
    study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    control = benchmark("ascent_control")
    file = study_file(n_documents=16, study={"name": "tiny", "n_trials": 30, "n_chunks": 2})
    found = control.compare(file, 1, tmp_path)
    start, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "start", tiny_models / "base"))
    for number in (0, 1):
        source = load_file(tiny_models / f"model_{number}" / "model.safetensors")
        random = load_file(tmp_path / f"random_{number + 1}" / "model.safetensors")
        for name, tensor in source.items():
            ours, theirs = tensor - base[name], random[name] - start[name]
            torch.testing.assert_close(theirs.norm(), ours.norm(), rtol=1e-3, atol=1e-6)
            if ours.numel() > 1000:
                assert abs(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)) < 0.2
    # both begin at the same merge, on the same documents
    objective = MergeObjective.from_file(
        file,
        {
            "study.seed": 1,
            "storage_path": str(tmp_path / "again"),
            "genome.base_model": str(tmp_path / "start"),
            "genome.models": [str(tmp_path / "random_1"), str(tmp_path / "random_2")],
        },
    )
    assert control.scores_of(objective, objective.space.baseline_recipe("base")) == found.start
    assert control.line([found]).startswith(
        f"from {found.start.searched:.3f} searched, {found.start.held_out:.3f} held"
    )
