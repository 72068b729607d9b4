from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engines.batches import Item, make_rows
from optuna_merge.evaluation.engines.beginnings import Beginnings
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.engines.whole_rows import make_whole
from optuna_merge.testing.conformance import TextRequest
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models
from tests.evaluation.test_hf import every_kind_of_request

REQUESTS = [request for request in every_kind_of_request() if request.request_type != "generate_until"][:40]


class SoftChoices:
    """A goal: requests in groups of four, of which the first is right."""

    def __init__(self, n: int = len(REQUESTS), scale: float = 1.0) -> None:
        self.together = [list(range(start, min(start + 4, n))) for start in range(0, n, 4)]
        self._scale = scale

    def value(self, log_likelihoods: np.ndarray[Any, Any]) -> float:
        return self._scale * sum(float(self._probabilities(log_likelihoods[group])[0]) for group in self.together)

    def gradient(self, log_likelihoods: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        gradient = np.zeros_like(log_likelihoods)
        for group in self.together:
            p = self._probabilities(log_likelihoods[group])
            gradient[group] = self._scale * p[0] * ((np.arange(len(group)) == 0) - p) / 30
        return gradient

    def _probabilities(self, log_likelihoods: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        weights = np.exp(log_likelihoods / 30)  # far apart in a random model
        return cast("np.ndarray[Any, Any]", weights / weights.sum())


def loaded(folder: Path, architecture: str, dtype: str = "float64", **options: Any) -> tuple[HFEngine, dict[str, Any]]:
    """An engine that computes all of its model in a dtype, and its weights."""
    engine = HFEngine(folder, device="cpu", dtype=cast(Any, dtype), **options)
    weights = {name: tensor.to(engine._weights.model.dtype) for name, tensor in read(folder).items()}
    engine.load_weights(weights.items())
    if architecture == "mixtral":
        engine._weights.model.set_experts_implementation("eager")  # the others know no float64
    for module in engine._weights.model.modules():
        if dtype == "float64" and type(module).__name__.endswith("RMSNorm"):
            cast(Any, module).forward = types.MethodType(rms_norm, module)  # transformers' own is in float32
    return engine, weights


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rms_norm(module: Any, hidden: Tensor) -> Tensor:
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return cast(Tensor, module.weight * hidden * scale)


def log_likelihoods(responses: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.array([response[0] if isinstance(response, tuple) else response for response in responses])


def gradients(engine: HFEngine, prepared: Any, goal: Any = None) -> tuple[dict[str, Tensor], list[Any]]:
    """The gradient of every tensor, and the responses."""
    sums: dict[str, Tensor] = {}

    def sink(name: str, gradient: Tensor) -> None:
        sums[name] = sums.get(name, 0) + gradient.double()

    return sums, engine.respond_with_gradient(prepared, goal or SoftChoices(), sink)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    # grouped queries, a tied head; untied with biases; a model of its own kind; fused experts
    [("llama", True), ("qwen2", False), ("gpt2", None), ("mixtral", None)],
)
def test_gradients_are_central_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: TinyArchitecture, tied: bool | None
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # in which a router computes
    _, [folder] = write_tiny_models(tmp_path, 1, architecture, n_layers=2, tied=tied, spread=0.3)
    engine, weights = loaded(folder, architecture)
    prepared = engine.prepare(REQUESTS)
    found, responses = gradients(engine, prepared)
    assert responses == engine.respond(prepared)
    assert engine._shares is True
    assert {name: gradient.shape for name, gradient in found.items()} == {n: w.shape for n, w in weights.items()}

    def value(name: str, step: Tensor) -> float:
        engine.load_weights({**weights, name: weights[name] + step}.items())
        return SoftChoices().value(log_likelihoods(engine.respond(prepared)))

    generator = torch.Generator().manual_seed(0)
    size = 1e-5
    for name in weights:
        step = size * torch.randn(weights[name].shape, generator=generator, dtype=torch.float64)
        by_difference = (value(name, step) - value(name, -step)) / 2
        assert float((found[name] * step).sum()) == pytest.approx(by_difference, rel=1e-5, abs=1e-5 * size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_models(tmp_path_factory.mktemp("models"), 1, spread=0.3)[1][0]


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[str, Tensor], list[Any]]:
    engine, _ = loaded(folder, "llama", batch_tokens=10_000)
    return gradients(engine, engine.prepare(REQUESTS))


def assert_same(found: tuple[dict[str, Tensor], list[Any]], expected: tuple[dict[str, Tensor], list[Any]]) -> None:
    assert log_likelihoods(found[1]) == pytest.approx(log_likelihoods(expected[1]), rel=1e-12)
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("shares", [None, False])
@pytest.mark.parametrize("recomputes", [True, False])
def test_groups_torn_between_batches_and_layers_computed_again_change_nothing(
    folder: Path, whole: Any, shares: bool | None, recomputes: bool
) -> None:
    engine, _ = loaded(folder, "llama", batch_tokens=50)
    engine._shares = shares
    engine._backward.recomputes = recomputes
    assert_same(gradients(engine, engine.prepare(REQUESTS)), whole)


def test_rows_are_put_behind_their_beginning() -> None:
    beginnings = Beginnings([(1, 2), (8, 9)])
    items = [Item((1, 2, 3), (4, 5, 6)), Item((1, 2, 3), (7, 7)), Item((8, 9, 3), (4,)), Item((1, 2, 6, 5), (4, 4))]
    items.append(Item((5,), (4, 4, 4)))
    rows = make_rows(items, share=True, beginnings=beginnings)
    together, alone, other = make_whole(rows, beginnings, batch_tokens=100)
    assert together.tokens == [1, 2, 3, 4, 5, 7, 6, 5, 4]
    assert together.positions == [0, 1, 2, 3, 4, 3, 2, 3, 4]
    assert together.ends == [9, 9, 6, 5, 5, 6, 9, 9, 9]
    assert sorted(together.scored) == [(0, [2, 3, 4]), (1, [2, 5]), (3, [7, 8])]
    assert (alone.tokens, alone.is_chain) == ([5, 4, 4], True)
    assert (other.tokens, other.is_chain, other.beginning) == ([8, 9, 3], True, None)
    # four tokens behind two, or as many as fill a pass
    assert [row.tokens[:2] for row in make_whole(rows, beginnings, batch_tokens=1)].count([1, 2]) == len(
        [row for row in rows if row.beginning == 0]
    )
    assert [len(row) for row in make_whole(rows, beginnings, batch_tokens=100, longest_shared=8)].count(9) == 0


def test_beginnings_that_prompts_have_in_common_are_computed_once_in_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning = "the cat sat on the mat and the dog ran after the cat and the mat"
    questions = [f"{beginning} {word}" for word in ("one", "two", "three four", "five", "six seven", "eight nine")]
    requests = [
        TextRequest("loglikelihood", (q, choice)) for q in questions for choice in (" A", " B", " one two", "C")
    ]
    goal = SoftChoices(len(requests))
    plain, _ = loaded(folder, "llama", batch_tokens=10_000)
    expected = gradients(plain, plain.prepare(requests), goal)
    engine, _ = loaded(folder, "llama", batch_tokens=300)
    assert engine.expect(requests) > 0
    prepared = engine.prepare(requests)
    sizes: list[int] = []
    logits = engine._forward.logits

    def watched(batch: Any, before: Any = None) -> Tensor:
        assert before is None
        sizes.append(batch.tokens.numel())
        return logits(batch)

    monkeypatch.setattr(engine._forward, "logits", watched)
    engine._shares = engine._is_causal = True
    assert_same(gradients(engine, prepared, goal), expected)
    assert sum(sizes) < 0.75 * sum(len(plain._language.lm.tok_encode(question)) for question in questions)


def test_one_gradient_lives_at_a_time(folder: Path) -> None:
    engine, weights = loaded(folder, "llama", batch_tokens=300)
    before: list[weakref.ref[Tensor]] = []
    came: list[str] = []

    def sink(name: str, gradient: Tensor) -> None:
        assert not any(other() is not None for other in before)
        assert all(parameter.grad is None for parameter in engine._weights.model.parameters())
        before.append(weakref.ref(gradient))
        came.append(name)

    engine.respond_with_gradient(engine.prepare(REQUESTS), SoftChoices(), sink)
    n_batches = len(came) // len(weights)
    assert n_batches > 1
    assert sorted(came) == sorted([*weights] * n_batches)
    assert not any(parameter.requires_grad for parameter in engine._weights.model.parameters())


def test_memory_that_runs_out_is_saved_and_no_gradient_counts_twice(
    folder: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = loaded(folder, "llama", batch_tokens=10_000)
    prepared = engine.prepare(REQUESTS)
    most = prepared.n_padded // 3
    sizes: list[int] = []

    def scarce(module: Any, *_: Any) -> None:
        # on the way back, when the gradients of the last layer have come
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    logits = engine._forward.logits

    def watched(batch: Any, before: Any = None) -> Tensor:
        sizes.append(batch.tokens.numel())
        return logits(batch, before)

    monkeypatch.setattr(engine._forward, "logits", watched)
    handle = engine._weights.model.model.layers[0].mlp.register_full_backward_pre_hook(scarce)
    found = gradients(engine, prepared)
    handle.remove()
    assert_same(found, whole)
    assert engine._backward.recomputes
    assert engine._backward.n_most_tokens is not None
    assert engine._backward.n_most_tokens < prepared.n_padded

    handle = engine._weights.model.model.layers[0].mlp.register_full_backward_pre_hook(scarce)
    most = 0
    with pytest.raises(
        EngineError, match=r"the gradient of a sequence of \d+ tokens does not fit into the memory of cpu"
    ):
        gradients(engine, prepared)
    handle.remove()
    assert all(parameter.grad is None for parameter in engine._weights.model.parameters())
    most = 10_000
    assert_same(gradients(engine, prepared), whole)


def test_what_a_sink_raises_ends_the_pass(folder: Path) -> None:
    engine, _ = loaded(folder, "llama")

    def sink(name: str, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory at {name}")

    with pytest.raises(torch.OutOfMemoryError, match=r"at .*weight"):
        engine.respond_with_gradient(engine.prepare(REQUESTS), SoftChoices(), sink)
    assert not engine._backward.recomputes


def test_small_slopes_do_not_vanish_in_float16(folder: Path, whole: Any) -> None:
    engine, _ = loaded(folder, "llama", "float16")
    found, _ = gradients(engine, engine.prepare(REQUESTS), SoftChoices(scale=1e-6))
    for name, gradient in whole[0].items():
        assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name
        assert 1e6 * found[name].norm() == pytest.approx(float(gradient.norm()), rel=0.1), name


def test_requests_without_a_log_likelihood_and_an_engine_without_weights_are_refused(folder: Path) -> None:
    engine, weights = loaded(folder, "llama")
    text = engine.prepare([TextRequest("generate_until", ("the cat", {"until": ["\n"], "max_gen_toks": 4}))])
    with pytest.raises(EngineError, match="must be a log-likelihood to be differentiated, got generate_until"):
        gradients(engine, text)
    with pytest.raises(EngineError):
        engine.load_weights(list(weights.items())[1:])
    with pytest.raises(EngineError, match="holds no complete set of weights"):
        gradients(engine, engine.prepare(REQUESTS))
