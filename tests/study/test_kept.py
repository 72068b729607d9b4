"""What methods make once: shared by the trials, the processes and the export of a study; its cost said by check."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optuna_merge.config.read import load_study
from optuna_merge.errors import MergeError
from optuna_merge.methods.kept import KeptTensors
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.study.check import check_study
from optuna_merge.study.export import export_trial
from optuna_merge.study.kept import plan_kept
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study


def genome_of(method: str, models: Path) -> dict[str, object]:
    sources = [str(models / f"model_{i}") for i in range(2)]
    return {"models": sources, "base_model": str(models / "base"), "merge_method": method}


@pytest.mark.parametrize(("method", "n_kept"), [("tsv_m", 2), ("iso_c", 1)])
def test_a_study_makes_its_matrices_once(
    method: str, n_kept: int, study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    genome = genome_of(method, tiny_models)
    file = study_file(genome=genome, study={"name": "tiny", "n_trials": 6, "n_chunks": 2})
    objective = MergeObjective.from_file(file)
    run_study(objective.config, objective)
    folder = objective.config.storage_path / "matrices"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    base = load_file(tiny_models / "base" / "model.safetensors")
    matrices = {name: tensor for name, tensor in base.items() if tensor.dim() == 2}
    assert len(files) == len(matrices)  # one file for each tensor, whatever the number of trials
    kept = [torch.load(path) for path in files]
    assert sum(tensor.numel() for tensor in kept) == n_kept * sum(tensor.numel() for tensor in matrices.values())
    plan = check_study(objective.config).kept
    assert plan is not None
    assert plan["n_bytes"] == sum(tensor.nbytes for tensor in kept)
    assert 0 < plan["seconds"] < 60

    # The export reads them, too: with other matrices in the files, it writes another model.
    study = open_study(storage_url(objective.config.storage_path, None), "tiny")
    number = max(trial.number for trial in study.trials if "baseline" not in trial.user_attrs)
    first = export_trial(study, objective.config, tmp_path / "first", number).folder
    for path, tensor in zip(files, kept, strict=True):
        torch.save(torch.zeros_like(tensor), path)
    second = export_trial(study, objective.config, tmp_path / "second", number).folder
    for name in matrices:
        assert torch.equal(load_file(second / "model.safetensors")[name], base[name])
        assert not torch.equal(load_file(first / "model.safetensors")[name], base[name]), name


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_check_makes_no_matrices(
    method: str, study_file: Callable[..., Path], tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeptTensors, "get", lambda *_: pytest.fail("made a matrix"))
    config = load_study(study_file(genome=genome_of(method, tiny_models)))
    found = check_study(config).trial_seconds
    assert found is not None
    assert found["merging"] > 0


def test_what_most_methods_keep_costs_nothing(study_file: Callable[..., Path]) -> None:
    assert plan_kept(load_study(study_file()), [(4, 4)]) is None


def test_the_first_who_asks_makes_a_matrix_and_others_wait(tmp_path: Path) -> None:
    n_made = 0
    has_begun, may_end = threading.Event(), threading.Event()

    def make() -> torch.Tensor:
        nonlocal n_made
        n_made += 1
        has_begun.set()
        may_end.wait(30)
        return torch.arange(6.0).view(2, 3)

    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(KeptTensors(tmp_path / "kept").get(("a",), make)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert has_begun.wait(30)
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert n_made == 1
    assert [tensor.tolist() for tensor in found] == [[[0, 1, 2], [3, 4, 5]]] * 3
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".pt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeError, match=r"file/kept: kept matrices must be writable, got .*; free some space"):
        KeptTensors(tmp_path / "file" / "kept").get(("a",), lambda: torch.zeros(1))
