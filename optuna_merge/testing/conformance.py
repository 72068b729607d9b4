"""For tests, ours and those of who builds on the package.

Tiny checkpoints that are made on the spot, an engine whose best weights are known, and what every engine must do.
"""

# ruff: noqa: D102 - a test's name is its description

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engine import Engine, Prepared, Request, Response

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


TinyArchitecture = Literal["llama", "mistral", "qwen2", "gemma", "gemma2", "gpt2", "gpt_neox", "mixtral"]

_TINY_TEXT = (
    "the cat sat on the mat and the dog ran after the cat",
    "one two three four five six seven eight nine ten",
    "Question: which letter comes next? Answer: A B C D",
)


def write_tiny_models(
    folder: Path,
    n_models: int = 2,
    architecture: TinyArchitecture = "llama",
    *,
    n_layers: int = 3,
    dtype: str = "float32",
    tied: bool | None = None,
    max_shard_size: str = "5GB",
    spread: float = 0.05,
    head_dim: int = 8,
) -> tuple[Path, list[Path]]:
    """Write a random base model and fine-tunes of it: real folders that transformers loads, with a real tokenizer.

    Args:
        folder: Where to; made if it is missing.
        n_models: Number of fine-tunes.
        architecture: Its shapes: two heads, 320 tokens, biases and tied embeddings as the architecture has them.
        n_layers: Number of layers.
        dtype: Of every stored tensor.
        tied: Whether the output head is the embedding; None: as the architecture has it.
        max_shard_size: As in ``save_pretrained``.
        spread: Standard deviation of the fine-tunes' difference to the base.
        head_dim: Width of a head; the model is twice as wide.

    Returns:
        ``folder/base``, and ``folder/model_0``, ``folder/model_1`` ...; the same bytes each time.
    """
    import torch

    base = _tiny_model(architecture, n_layers, tied, head_dim)
    tokenizer = _tiny_tokenizer()
    paths = []
    for number in range(-1, n_models):
        generator = torch.Generator().manual_seed(number + 1)
        model = _tiny_model(architecture, n_layers, tied, head_dim)
        model.load_state_dict(base.state_dict())
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.2 if number < 0 else spread) * noise
        if number < 0:
            base.load_state_dict(model.state_dict())
        path = folder / ("base" if number < 0 else f"model_{number}")
        model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(path)
        paths.append(path)
    return paths[0], paths[1:]


def _tiny_model(architecture: TinyArchitecture, n_layers: int, tied: bool | None, head_dim: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 3 * head_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if architecture == "gpt2":
        settings = {"vocab_size": 320, "n_embd": 2 * head_dim, "n_layer": n_layers, "n_head": 2, "n_positions": 64}
        settings |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if architecture == "gpt_neox":
        del settings["num_key_value_heads"], settings["head_dim"]
    if architecture == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast("PreTrainedModel", cast(Any, AutoModelForCausalLM).from_config(config))


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TINY_TEXT, trainer)
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@dataclass(frozen=True)
class FakePrepared:
    """Requests as :class:`FakeEngine` keeps them; a token is a character."""

    requests: tuple[Request, ...]
    n_tokens: int
    longest: int
    n_padded: int = 0
    n_scored: int = 0
    n_cached: int = 0

    @property
    def n_requests(self) -> int:
        """How many responses there will be."""
        return len(self.requests)

    @property
    def cost(self) -> float:
        """``n_tokens``: there is no forward pass."""
        return self.n_tokens


class FakeEngine:
    """An engine without a model: its skill is a known function of the weights, best at a known point.

    The skill is ``exp(-mean squared distance of the weights to the optimum)``, in (0, 1]. Every context has a
    difficulty in [0, 1), drawn from a hash of its text; a right continuation is more likely than any other one
    exactly if the skill exceeds it. So over many documents whose gold choice is :attr:`right`, accuracy is the
    skill, every document is passed by all merges above some skill, and a search has a known optimum.

    Attributes:
        right: The continuation, or generated text, that is right everywhere.
        n_loads: Completed loads.
        n_responses: Responses given.
    """

    dtype = "float32"
    device = "cpu"
    batch_tokens = 1
    tokenizer_name = "fake"
    has_chat_template = False
    eot_text = "</s>"

    def __init__(self, optimum: Mapping[str, Tensor], *, right: str = " right") -> None:
        self._optimum = {name: tensor.float() for name, tensor in optimum.items()}
        self._skill: float | None = None
        self.right = right
        self.n_loads = 0
        self.n_responses = 0

    @property
    def skill(self) -> float:
        """Of the weights that are loaded.

        Raises:
            EngineError: If no complete set of weights is loaded.
        """
        if self._skill is None:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        return self._skill

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refuses: there is no template."""
        raise EngineError("engine: the tokenizer must have a chat template, got none; do not apply it")

    def resident(self, name: str) -> Tensor | None:
        """Nothing is resident."""
        return None

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Measure the distance to the optimum; checks the stream as every engine does."""
        self._skill = None
        distance = 0.0
        missing = dict.fromkeys(self._optimum)
        for name, tensor in tensors:
            if name not in missing:
                what = "be delivered once" if name in self._optimum else "be in the checkpoint"
                raise EngineError(f"{name}: must {what}; correct the merge")
            if tensor.shape != self._optimum[name].shape:
                shapes = f"{list(self._optimum[name].shape)}, got {list(tensor.shape)}"
                raise EngineError(f"{name}: shape must be {shapes}; correct the merge")
            if not tensor.isfinite().all():
                raise NonFiniteMergeError(f"{name}: must be finite, got NaN or infinity; this merge cannot be scored")
            distance += float((tensor.float().cpu() - self._optimum[name]).square().mean())
            del missing[name]
        if missing:
            raise EngineError(f"{next(iter(missing))}: must be delivered, got nothing; correct the merge")
        self._skill = math.exp(-distance / max(1, len(self._optimum)))
        self.n_loads += 1

    def prepare(self, requests: Sequence[Request]) -> FakePrepared:
        """Keep the requests."""
        lengths = [sum(len(part) for part in request.args if isinstance(part, str)) for request in requests]
        return FakePrepared(tuple(requests), sum(lengths), max(lengths, default=0))

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer as far as the skill goes."""
        assert isinstance(prepared, FakePrepared)
        skill = self.skill
        self.n_responses += prepared.n_requests
        return [self._answer(request, skill) for request in prepared.requests]

    def close(self) -> None:
        """Forget the weights."""
        self._skill = None

    def _answer(self, request: Request, skill: float) -> Response:
        text = request.args[0]
        if request.request_type == "loglikelihood_rolling":
            return len(text) * (skill - 2.0)
        digest = hashlib.sha256(text.encode()).digest()
        surplus = skill - int.from_bytes(digest[:6], "big") / 2**48
        if request.request_type == "generate_until":
            return self.right if surplus > 0 else ""
        is_right = request.args[1] == self.right
        return (-1.0 + surplus if is_right else -1.0), is_right == (surplus > 0)


def merge_tensors(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    name: str = "model.layers.0.mlp.up_proj.weight",
    seed: int = 0,
    dtype: str = "float32",
    identities: Sequence[str] | None = None,
    chunk_elements: int = 1 << 18,
    kernel_elements: int = 1 << 24,
    is_compiled: bool = False,
    **settings: bool | float | Sequence[float],
) -> Tensor:
    """Merge one tensor of each model, without checkpoints.

    Args:
        method: A name in ``METHODS``, or the import path of a user's method.
        models: One tensor of each source, of the same shape.
        base: The base's, if the method has one.
        name: What the tensor is called.
        seed: Seeds random masks.
        dtype: Of the result.
        identities: What tells the models' random masks apart; None: ``"0"``, ``"1"`` ...
        chunk_elements: Size of the pieces.
        kernel_elements: Likewise, of those for compiled arithmetic.
        is_compiled: Whether elementwise arithmetic is compiled.
        **settings: Switches and method parameters by name, ``lambda_`` for lambda; one number means the same for each
            model.
    """
    import torch

    from optuna_merge.methods import find_method
    from optuna_merge.methods.function import MergeInput

    declared = find_method(method)
    given = {key.rstrip("_"): value for key, value in settings.items()}
    values = {
        p.name: given.pop(p.name, 1 / len(models) if p.default is None else p.default) for p in declared.parameters
    }
    switches = {switch: bool(given.pop(switch, default)) for switch, default in declared.switches}
    assert not given, f"{method} has no {sorted(given)}"
    per_model = {
        p.name: tuple(value) if isinstance(value, Sequence) else (float(value),) * len(models)
        for p in declared.parameters
        if p.per_model
        for value in (values[p.name],)
    }
    out = torch.full(models[0].shape, torch.nan, dtype=getattr(torch, dtype), device=models[0].device)
    inputs = MergeInput(
        name=name,
        base=base,
        models=tuple(models),
        per_model=per_model,
        shared={p.name: cast(float, values[p.name]) for p in declared.parameters if not p.per_model},
        switches=switches,
        seed=seed,
        identities=tuple(identities or map(str, range(len(models)))),
        device=models[0].device,
        chunk_elements=chunk_elements,
        kernel_elements=kernel_elements,
        is_compiled=is_compiled,
    )
    declared.load()(inputs, out)
    return out


class MethodConformance:
    """What every merge method must do; a test class of a method inherits from it.

    Attributes:
        method: Name of the method.
        n_models: How many models it is tried with.
        settings: Settings with which identical models give that model, where the defaults do not.
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
        """The size of the pieces is a matter of speed alone."""
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


@dataclass(frozen=True)
class TextRequest:
    """A request made by hand."""

    request_type: str
    args: tuple[Any, ...]


class EngineConformance:
    """What every engine must do; subclass it in a test and say how to make one.

    The engine is made once for a tiny checkpoint of random weights and loaded with it and with a fine-tune of it.
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
        """The engine to test, for the checkpoint in ``folder``."""
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
        assert [type(response) for response in responses[0]] == [tuple, tuple, tuple, str, float]
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
