"""What every merge method and every engine must do, as test classes to inherit from.

For the tests of this package and of packages that extend it. Knows the seams, not how a method or an engine works.
"""

# ruff: noqa: D102 - a test's name is its description

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engine import Engine, Prepared, Request, Response
from optuna_merge.testing.methods import merge_tensors
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

if TYPE_CHECKING:
    from torch import Tensor


class MethodConformance:
    """What every merge method must do; inherit from it in the test class of a method.

    Attributes:
        method: Name of the method.
        n_models: Number of models to try it with.
        settings: Settings with which identical models give that model, if the defaults do not.
        exact: Greatest relative difference to that model.
    """

    method: str
    n_models = 3
    settings: Mapping[str, Any] = {}
    exact = 1e-6

    def _random(self, shape: tuple[int, ...], seed: int) -> Tensor:
        import torch

        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def _models(
        self, shape: tuple[int, ...] = (13, 37), n_models: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        from optuna_merge.methods import find_method

        base = self._random(shape, 0)
        models = [base + 0.1 * self._random(shape, seed + 1) for seed in range(n_models or self.n_models)]
        return models, None if find_method(self.method).base == "none" else base

    def test_identical_models_give_that_model(self) -> None:
        """The merge of a model with itself is the model."""
        import torch

        (model,), base = self._models(n_models=1)
        merged = merge_tensors(
            self.method, [model] * self.n_models, base, identities=["same"] * self.n_models, **self.settings
        )
        torch.testing.assert_close(merged, model, rtol=self.exact, atol=self.exact / 10)

    def test_pieces_change_no_bit(self) -> None:
        """The size of the pieces affects speed only."""
        models, base = self._models()
        whole = merge_tensors(self.method, models, base)
        for chunk_elements in (1, 50, 111):
            assert merge_tensors(self.method, models, base, chunk_elements=chunk_elements).equal(whole)

    def test_models_are_only_read(self) -> None:
        """Neither the models nor the base change."""
        models, base = self._models()
        before = [model.clone() for model in models]
        merge_tensors(self.method, models, base)
        assert all(model.equal(copy) for model, copy in zip(models, before, strict=True))
        if base is not None:
            assert base.equal(self._random(tuple(base.shape), 0))

    def test_the_result_is_rounded_once(self) -> None:
        """A narrower dtype is the float32 result, rounded."""
        import torch

        models, base = self._models()
        assert merge_tensors(self.method, models, base, dtype="bfloat16").equal(
            merge_tensors(self.method, models, base).to(torch.bfloat16)
        )

    def test_any_shape(self) -> None:
        """Scalars, single elements and empty tensors merge."""
        for shape in ((), (1,), (5,), (0,), (3, 0), (2, 3, 4)):
            models, base = self._models(shape)
            merged = merge_tensors(self.method, models, base)
            assert merged.shape == shape
            assert merged.isfinite().all()

    def test_rows_that_no_fine_tune_changed_stay(self) -> None:
        """Fine-tunes change a part of a tensor, and are rounded; a source may equal the base or another source."""
        import torch

        for dtype, settings in itertools.product(("bfloat16", "float16", "float32"), ({}, self._mid_range())):
            base = (0.1 * self._random((24, 64), 0)).to(getattr(torch, dtype))
            tunes = [self._fine_tune(base, seed + 1) for seed in range(self.n_models)]
            zeros = torch.zeros_like(base)
            for start, models in (
                (base, tunes),
                (base, [tunes[0], *tunes[:-1]]),
                (base, [*tunes[:-1], base]),
                (base, [base] * self.n_models),
                (zeros, [*tunes[:-1], zeros]),
                (zeros, [zeros] * self.n_models),
            ):
                merged = merge_tensors(self.method, models, start if self._has_base() else None, **settings)
                assert merged.isfinite().all(), (dtype, settings)
                is_unchanged = torch.stack([(model == start).all(1) for model in models]).all(0)
                expected = start[is_unchanged].float()
                torch.testing.assert_close(merged[is_unchanged], expected, rtol=1e-4, atol=1e-6)

    def test_what_is_not_finite_never_becomes_finite(self) -> None:
        """NaN or infinity in a source is in the result, or the method refuses the tensor by name."""
        import torch

        negative_nan = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # its sign bit is set
        values = (torch.tensor(math.nan), negative_nan, torch.tensor(math.inf), torch.tensor(-math.inf))
        places = ((3, 5), (slice(None), 5), slice(1, None))  # one element, one of each row, nearly all
        positions = range(self.n_models + self._has_base())
        cases = itertools.product(({}, self._mid_range()), values, places, positions)
        for settings, bad, place, position in cases:
            models, base = self._models((4, 1024))
            [*models, base][position][place] = bad
            try:
                is_reported = not merge_tensors(self.method, models, base, **settings).isfinite().all()
            except NonFiniteMergeError as exc:
                is_reported = str(exc).startswith("model.layers.0.mlp.up_proj.weight: ")
            assert is_reported, (settings, bad, place, position)

    def test_a_base_that_is_unused_has_no_influence(self) -> None:
        """A method that declares its base unused makes the same merge with any base, and without one."""
        models, base = self._models()
        if base is not None and not self._has_base():
            merged = merge_tensors(self.method, models, base)
            for other in (None, base + 1):
                assert merge_tensors(self.method, models, other).equal(merged)

    def _fine_tune(self, base: Tensor, seed: int) -> Tensor:
        """The base with a small change of its last rows, rounded to its dtype."""
        changed = base.float()
        changed[len(base) // 3 :] += 1e-4 * self._random((len(base) - len(base) // 3, base.shape[1]), seed)
        return changed.to(base.dtype)

    def _has_base(self) -> bool:
        """Whether the base is part of the arithmetic."""
        from optuna_merge.methods import find_method

        return self._models()[1] is not None and find_method(self.method).base != "unused"

    def _mid_range(self) -> dict[str, Any]:
        """The middle of each parameter's range to search, as for :func:`merge_tensors`."""
        from optuna_merge.methods import find_method

        parameters = find_method(self.method).parameters_for(self._models()[1] is not None)
        return {parameter.name: sum(parameter.search) / 2 for parameter in parameters if parameter.search is not None}


@dataclass(frozen=True)
class TextRequest:
    """A request written by hand.

    Attributes:
        request_type: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``.
        args: As lm-eval passes them for this kind of request.
    """

    request_type: str
    args: tuple[Any, ...]


class EngineConformance:
    """What every engine must do; inherit from it in a test class and override :meth:`make_engine`.

    Each test makes an engine for a tiny checkpoint of random weights, and loads that checkpoint and a fine-tune of it.

    Attributes:
        architecture: Architecture of the checkpoint.
        head_dim: Width of its attention heads.
        tolerance: Greatest difference between log-probabilities of one request asked alone and among others.
        requests: Two with one context, one without context, one to generate text, and one for a whole text.
    """

    architecture: TinyArchitecture = "llama"
    head_dim = 8
    tolerance = 1e-4
    requests: Sequence[Request] = (
        TextRequest("loglikelihood", ("one two three", " four")),
        TextRequest("loglikelihood", ("one two three", " right")),
        TextRequest("loglikelihood", ("", "the cat")),
        TextRequest("generate_until", ("the dog", {"until": ["\n"], "max_gen_toks": 4})),
        TextRequest("loglikelihood_rolling", ("the cat sat on the mat",)),
    )

    def make_engine(self, folder: Path) -> Engine:
        """Make the engine to test, for the checkpoint in ``folder``."""
        raise NotImplementedError

    def _loaded(self, folder: Path) -> tuple[Engine, dict[str, Tensor], dict[str, Tensor]]:
        from safetensors.torch import load_file

        base, [other] = write_tiny_models(folder, 1, self.architecture, spread=0.5, head_dim=self.head_dim)
        weights, others = (load_file(path / "model.safetensors") for path in (base, other))
        return self.make_engine(base), weights, others

    def test_refuses_to_score_before_a_load(self, tmp_path: Path) -> None:
        engine, _, _ = self._loaded(tmp_path)
        _refuses_to_score(engine, engine.prepare(self.requests))

    def test_equal_weights_give_equal_responses_whatever_was_loaded_before(self, tmp_path: Path) -> None:
        engine, base, other = self._loaded(tmp_path)
        prepared = engine.prepare(self.requests)
        responses = []
        for weights in (base, other, base):
            engine.load_weights(weights.items())
            responses.append(engine.respond(prepared))
        assert responses[0] == responses[2] != responses[1]
        kinds = [tuple, tuple, tuple, str, float]
        assert all(isinstance(response, kind) for response, kind in zip(responses[0], kinds, strict=True))
        assert prepared.n_requests == len(self.requests)

    def test_the_order_of_tensors_and_their_dtype_do_not_matter(self, tmp_path: Path) -> None:
        import torch

        engine, base, _ = self._loaded(tmp_path)
        prepared = engine.prepare(self.requests)
        rounded = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in base.items()}
        engine.load_weights(rounded.items())
        responses = engine.respond(prepared)
        engine.load_weights((name, tensor.to(torch.bfloat16)) for name, tensor in reversed(rounded.items()))
        assert engine.respond(prepared) == responses

    def test_a_request_is_answered_alike_in_any_company(self, tmp_path: Path) -> None:
        engine, base, _ = self._loaded(tmp_path)
        engine.load_weights(base.items())
        together = engine.respond(engine.prepare(self.requests))
        for request, response in zip(self.requests, together, strict=True):
            [alone] = engine.respond(engine.prepare([request]))
            assert _is_close(alone, response, self.tolerance), request

    def test_writing_into_resident_tensors_is_loading(self, tmp_path: Path) -> None:
        engine, base, other = self._loaded(tmp_path)
        prepared = engine.prepare(self.requests)
        engine.load_weights(other.items())
        expected = engine.respond(prepared)
        engine.load_weights(base.items())

        def written() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in other.items():
                into = engine.resident(name)
                yield name, tensor if into is None else into.copy_(tensor)

        engine.load_weights(written())
        assert engine.respond(prepared) == expected

    def test_a_refused_load_names_the_tensor_and_the_next_one_is_right(self, tmp_path: Path) -> None:
        import torch

        engine, base, other = self._loaded(tmp_path)
        prepared = engine.prepare(self.requests)
        engine.load_weights(base.items())
        expected = engine.respond(prepared)
        name = list(base)[-1]
        infinite = other[name].clone()
        infinite.view(-1)[0] = math.inf
        cases: list[tuple[type[Exception], str, Iterable[tuple[str, Tensor]]]] = [
            (NonFiniteMergeError, name, {**other, name: infinite}.items()),
            (NonFiniteMergeError, name, {**other, name: infinite * 0}.items()),
            (EngineError, name, {**other, name: torch.zeros(1, 1, 1)}.items()),
            (EngineError, name, [(n, t) for n, t in other.items() if n != name]),
            (EngineError, name, [*other.items(), (name, other[name])]),
            (EngineError, "no.such.tensor", [*other.items(), ("no.such.tensor", other[name])]),
        ]
        for error, named, stream in cases:
            _raises(error, named, partial(engine.load_weights, stream))
            _refuses_to_score(engine, prepared)
            engine.load_weights(base.items())
            assert engine.respond(prepared) == expected

    def test_an_interrupted_load_leaves_nothing_to_score(self, tmp_path: Path) -> None:
        engine, base, other = self._loaded(tmp_path)
        prepared = engine.prepare(self.requests)
        engine.load_weights(base.items())
        expected = engine.respond(prepared)

        def torn() -> Iterator[tuple[str, Tensor]]:
            yield next(iter(other.items()))
            raise KeyboardInterrupt("torn")

        _raises(KeyboardInterrupt, "torn", lambda: engine.load_weights(torn()))
        _refuses_to_score(engine, prepared)
        engine.load_weights(base.items())
        assert engine.respond(prepared) == expected

    def test_closing_twice_is_harmless(self, tmp_path: Path) -> None:
        engine, _, _ = self._loaded(tmp_path)
        engine.close()
        engine.close()


def _refuses_to_score(engine: Engine, prepared: Prepared) -> None:
    _raises(EngineError, "load a merge first", lambda: engine.respond(prepared))


def _raises(error: type[BaseException], text: str, call: Callable[[], object]) -> None:
    import pytest

    with pytest.raises(error, match=re.escape(text)):
        call()


def _is_close(response: Response, other: Response, tolerance: float) -> bool:
    if isinstance(response, tuple) and isinstance(other, tuple):
        return response[1] == other[1] and abs(response[0] - other[0]) <= tolerance
    if isinstance(response, float) and isinstance(other, float):
        return abs(response - other) <= tolerance
    return response == other
