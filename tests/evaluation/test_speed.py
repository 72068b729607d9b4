from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optuna_merge.evaluation.engines import speed
from optuna_merge.evaluation.engines.speed import Speed, measure_speed
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models
from tests.evaluation.test_generator import change
from tests.evaluation.test_hf import ARCHITECTURES


def measure(folder: Path) -> Speed | None:
    return measure_speed(
        folder, dtype=torch.float32, device=torch.device("cpu"), batch_tokens=128, trust_remote_code=False
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_timed_on_a_few_layers(tmp_path: Path, architecture: TinyArchitecture) -> None:
    base, _ = write_tiny_models(tmp_path, 0, architecture)
    found = measure(base)
    assert found is not None
    assert found.token > 0
    assert found.place > 0


def test_times_are_those_of_all_layers_and_of_the_whole_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "llama")
    change(base / "config.json", num_hidden_layers=24, vocab_size=40960)
    n_calls = 0

    def seconds(function: Any, device: torch.device) -> float:
        nonlocal n_calls
        function()
        n_calls += 1
        return [1.0, 2.0, 5.0][n_calls - 1]  # two layers, four layers, logits of 64 tokens and 4096 words

    monkeypatch.setattr(speed, "_seconds", seconds)
    assert measure(base) == Speed(token=(1 + 22 * 0.5) / 128, place=5 / 64 * 10)


def test_a_model_that_cannot_be_cut_is_not_timed(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "llama")
    change(base / "config.json", hidden_act="unknown")
    assert measure(base) is None
