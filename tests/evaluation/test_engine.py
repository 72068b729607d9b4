from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optuna_merge.errors import EngineError
from optuna_merge.testing.conformance import EngineConformance, TextRequest
from optuna_merge.testing.engine import FakeEngine


class TestFakeEngine(EngineConformance):
    def make_engine(self, folder: Path) -> FakeEngine:
        return FakeEngine(load_file(folder / "model.safetensors"))


def test_the_fake_is_best_at_its_optimum() -> None:
    engine = FakeEngine({"a": torch.zeros(2), "b": torch.ones(2, 2)})
    engine.load_weights([("a", torch.zeros(2)), ("b", torch.ones(2, 2))])
    assert engine.skill == 1
    engine.load_weights([("a", torch.full((2,), 2.0)), ("b", torch.ones(2, 2))])
    # the mean square is 4 in one of two tensors
    assert engine.skill == pytest.approx(2.718281828459045**-2)


def test_the_fake_answers_as_many_contexts_as_its_skill() -> None:
    engine = FakeEngine({"a": torch.zeros(1)})
    engine.load_weights([("a", torch.tensor([0.6]))])
    requests = [TextRequest("loglikelihood", (f"question {i}", c)) for i in range(500) for c in (" right", " wrong")]
    responses = engine.respond(engine.prepare(requests))
    passed = sum(right > wrong for (right, _), (wrong, _) in zip(responses[::2], responses[1::2], strict=True))
    assert passed / 500 == pytest.approx(engine.skill, abs=0.05)


def test_the_fake_has_no_chat_template() -> None:
    with pytest.raises(EngineError, match="must have a chat template"):
        FakeEngine({}).apply_chat_template([])
