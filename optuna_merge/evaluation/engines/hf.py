"""The engine that runs a model with transformers, on top of lm-eval's ``HFLM``.

Text is turned into tokens, generated and cut by lm-eval's own code, so that responses are lm-eval's. Log-likelihoods
are computed here: each context once for all of its continuations, logits only where something is scored, one
transfer for each batch.

Departure from lm-eval: the softmax is taken in float32 whatever the model's dtype, where lm-eval rounds
log-probabilities to the model's dtype. In float32 both agree to rounding.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from optuna_merge.errors import EngineError, is_out_of_memory
from optuna_merge.evaluation.engine import Prepared, Request, Response
from optuna_merge.evaluation.engines.batches import PASS_TOKENS, Item, Row, make_batches, make_rows
from optuna_merge.evaluation.engines.hf_weights import ResidentModel
from optuna_merge.evaluation.engines.language import Encoded, Language
from optuna_merge.evaluation.quiet import quietly

Dtype = Literal["float32", "float16", "bfloat16"]

CUDA_BATCH_TOKENS = 8192
CPU_BATCH_ACTIVATIONS = 2**16
"""Batch tokens x hidden size on a CPU: more does not make a token cheaper, it makes activations leave the cache."""

SCORED_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""Logits of one batch at most, vocabulary x scored tokens; they are held in float32."""

GENERATION_SEED = 1234
"""Seeds sampling, for tasks that ask for it, before every call: equal weights give equal texts."""

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class _Batch:
    """One forward pass, its tensors already on the device.

    Shapes: ``n`` rows, ``length`` tokens, ``n_scored`` different places, ``n_wanted`` tokens of continuations.
    """

    tokens: Tensor  # [n, length]
    positions: Tensor | None  # [n, length]; None if all rows are chains
    ends: Tensor | None  # [n, length]
    rows: Tensor  # [n_scored]
    columns: Tensor  # [n_scored]
    places: Tensor  # [n_wanted], index into the scored places
    wanted: Tensor  # [n_wanted], token ids
    items: list[int]
    starts: list[int]  # of each item among the wanted tokens


@dataclass
class HFPrepared:
    """Requests, tokenized and grouped, with the batches of the last plan."""

    encoded: Encoded
    n_tokens: int
    cost: float
    n_padded: int
    n_scored: int
    n_cached: int
    plan: tuple[Any, list[_Batch]] | None = field(default=None, repr=False)

    @property
    def n_requests(self) -> int:
        """How many responses there will be."""
        return self.encoded.n_requests

    @property
    def longest(self) -> int:
        """Tokens in the longest input sequence."""
        return self.encoded.longest


class HFEngine:
    """A transformers model that stays on its device while its weights change.

    Attributes:
        dtype: Of the resident weights.
        device: Where they live; ``meta`` for an engine that only tokenizes.
        batch_tokens: Padded tokens of one forward pass, about; halved when memory runs out.
        tokenizer_name: As lm-eval names it.
        eot_text: Text of the end-of-sequence token.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        device: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        names: Iterable[str] | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> None:
        """Build model and tokenizer from a checkpoint folder; reads no weights, and needs the folder no longer.

        Args:
            path: Folder with ``config.json`` and tokenizer.
            dtype: Of the resident weights.
            device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:<i>``, or ``meta`` to hold no weights.
            batch_tokens: Padded tokens of one forward pass, about; at least 1.
            names: Of the tensors that will be loaded; None: those of the weights in the folder.
            trust_remote_code: Run model code that the folder brings.
            attention: An attention implementation of transformers; None lets it choose.

        Raises:
            EngineError: If there is no such device, or model or tokenizer cannot be built.
        """
        target = _device(device)
        self.dtype: str = dtype
        self.device = str(target)
        folder = Path(path)
        self._weights = ResidentModel(
            folder,
            dtype=getattr(torch, dtype),
            device=target,
            names=names,
            trust_remote_code=trust_remote_code,
            attention=attention,
        )
        self._language = Language(self._weights.model, folder, trust_remote_code=trust_remote_code)
        self._forward = _Forward(self._weights.model)
        self.batch_tokens = _batch_tokens(target, self._forward.width) if batch_tokens == "auto" else batch_tokens
        self._shares: bool | None = None if self._forward.may_share else False
        self.tokenizer_name = self._language.name
        self.eot_text = self._language.eot_text

    @classmethod
    def tokenizer_only(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "float32",
        batch_tokens: int | Literal["auto"] = "auto",
        trust_remote_code: bool = False,
    ) -> HFEngine:
        """An engine that renders and prepares requests but takes no memory for weights and answers nothing."""
        return cls(path, dtype=dtype, device="meta", batch_tokens=batch_tokens, trust_remote_code=trust_remote_code)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self._language.has_chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one prompt, as lm-eval does."""
        return self._language.apply_chat_template(chat_history, add_generation_prompt)

    def resident(self, name: str) -> Tensor | None:
        """The tensor that the checkpoint tensor ``name`` is loaded into; see ``Engine.resident``."""
        return self._weights.resident(name)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the weights in place; see ``Engine.load_weights``."""
        if self.device == "meta":
            raise EngineError("engine: was built without weights, to tokenize only; build one on a device")
        with torch.no_grad():
            self._weights.load(tensors)

    def prepare(self, requests: Sequence[Request]) -> HFPrepared:
        """Tokenize and group requests; see ``Engine.prepare``."""
        encoded = self._language.encode(requests)
        batches = self._cut(encoded.items, self._shares is not False)
        n_prompts = sum(len(tokens) for _, _, tokens in encoded.generated)
        n_tokens = sum(len(row) for batch in batches for row in batch)
        cost = sum(len(batch) * len(batch[0]) + PASS_TOKENS * self.batch_tokens for batch in batches)
        generating = max(self.batch_tokens, _with_answer(self._language.lm, encoded)) if encoded.generated else 0
        return HFPrepared(
            encoded,
            n_tokens + n_prompts,
            cost + n_prompts,
            n_padded=max([generating, *(len(batch) * len(batch[0]) for batch in batches)]),
            n_scored=max((sum(row.n_scored for row in batch) for batch in batches), default=0),
            n_cached=generating,
        )

    def respond(self, prepared: Prepared) -> list[Response]:
        """Answer prepared requests; see ``Engine.respond``."""
        assert isinstance(prepared, HFPrepared)
        if not self._weights.is_complete:
            raise EngineError("engine: holds no complete set of weights; load a merge first")
        while True:
            try:
                return self._respond(prepared)
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
                self._shrink(prepared, exc)

    def close(self) -> None:
        """Free the model's memory."""
        if hasattr(self, "_weights"):
            self._forward.close()
            del self._weights, self._language, self._forward
            gc.collect()
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()

    def _respond(self, prepared: HFPrepared) -> list[Response]:
        responses: list[Response] = [0.0] * prepared.n_requests
        with torch.inference_mode():
            if self._shares is None:
                self._shares = self._try_sharing(prepared.encoded.items)
            answers = self._score(prepared.encoded.items, self._batches(prepared))
        for index, items, rolling in prepared.encoded.scored:
            if rolling:
                responses[index] = float(sum(answers[item][0] for item in items))
            else:
                [responses[index]] = [answers[item] for item in items]
        generated = prepared.encoded.generated
        if generated:
            texts = self._generate([request for _, request, _ in generated], prepared.encoded)
            for (index, _, _), text in zip(generated, texts, strict=True):
                responses[index] = text
        return responses

    def _batches(self, prepared: HFPrepared) -> list[_Batch]:
        share = self._shares is not False
        key = (share, self.batch_tokens)
        if prepared.plan is None or prepared.plan[0] != key:
            prepared.plan = key, self._planned(prepared.encoded.items, share)
        return prepared.plan[1]

    def _planned(self, items: Sequence[Item], share: bool) -> list[_Batch]:
        device = torch.device(self.device)
        return [_on_device(batch, items, device) for batch in self._cut(items, share)]

    def _cut(self, items: Sequence[Item], share: bool) -> list[list[Row]]:
        rows = make_rows(items, share=share, longest_shared=self._forward.window)
        kind = torch.device(self.device).type
        scored = max(1, SCORED_LOGITS.get(kind, SCORED_LOGITS["cpu"]) // self._forward.vocabulary)
        return make_batches(
            rows, batch_tokens=self.batch_tokens, batch_scored=scored, longest_shared=self._forward.window
        )

    def _score(self, items: Sequence[Item], batches: Sequence[_Batch]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(items)
        for batch in batches:
            log_probabilities, greedy = self._forward.score(batch)
            sums = np.add.reduceat(log_probabilities, batch.starts)
            exact = np.logical_and.reduceat(greedy, batch.starts)
            for item, total, is_greedy in zip(batch.items, sums.tolist(), exact.tolist(), strict=True):
                answers[item] = total, is_greedy
        return answers

    def _try_sharing(self, items: Sequence[Item]) -> bool | None:
        """Whether continuations that share a row score as they do apart; None if there is nothing to try on.

        Which models read a mask and positions as given cannot be told from their configuration alone.
        """
        trees = [row for row in make_rows(items, share=True, longest_shared=self._forward.window) if not row.is_chain]
        if not trees:
            return None
        probe = [items[index] for index, _ in trees[0].scored]
        try:
            shared = self._score(probe, self._planned(probe, share=True))
        except (TypeError, ValueError, NotImplementedError):
            return False
        apart = self._score(probe, self._planned(probe, share=False))
        per_token = [
            abs(a - b) / len(item.continuation) for (a, _), (b, _), item in zip(shared, apart, probe, strict=True)
        ]
        if not np.isfinite(per_token).all():
            return None
        return float(np.mean(per_token)) <= (1e-3 if self.dtype == "float32" else 0.1)

    def _generate(self, requests: list[Request], encoded: Encoded) -> list[str]:
        lm = self._language.lm
        lm.batch_size_per_gpu = max(1, self.batch_tokens // _with_answer(lm, encoded))
        devices = [self.device] if self.device.startswith("cuda") else []
        with quietly(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(GENERATION_SEED)
            return cast("list[str]", lm.generate_until(requests, disable_tqdm=True))

    def _shrink(self, prepared: HFPrepared, exc: Exception) -> None:
        prepared.plan = None
        if self.batch_tokens <= max(1, prepared.longest // 2):
            raise EngineError(
                f"engine: a sequence of {prepared.longest} tokens does not fit into the memory of {self.device}; "
                "use shorter prompts, a smaller dtype or a larger device"
            ) from exc
        self.batch_tokens //= 2
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


class _Forward:
    """Forward passes that compute logits only where something is scored.

    Attributes:
        may_share: Whether the model's design allows several continuations in one row.
        window: Tokens that such a row may have at most; None: any number.
        vocabulary: Size of the output layer.
        width: Of the hidden states.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        self.may_share = _takes_trees(model, config, self._parameters)
        # sliding_window, window_size, attention_window, attention_chunk_size ...
        windows = [
            value
            for key, value in config.to_dict().items()
            if re.search(r"window(?!_layers)|attention_chunk", key) and isinstance(value, int) and value > 1
        ]
        self.window = min(windows) if windows else None
        self.vocabulary = int(config.vocab_size)
        self.width = int(config.hidden_size)
        self._scored: tuple[Tensor, Tensor] | None = None
        self._selected = False
        head = model.get_output_embeddings()
        self._hook = head.register_forward_pre_hook(self._select) if head is not None else None

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def score(self, batch: _Batch) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Log-probability of each wanted token, and whether it is the likeliest one; both ``[n_wanted]``."""
        logits = self._logits(batch).float()  # [n_scored, vocabulary]
        normalizer = logits.logsumexp(-1)
        log_probabilities = logits[batch.places, batch.wanted] - normalizer[batch.places]
        greedy = logits.argmax(-1)[batch.places] == batch.wanted
        both = torch.stack([log_probabilities.double(), greedy.double()]).cpu().numpy()
        return both[0], both[1] == 1

    def _logits(self, batch: _Batch) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": batch.tokens}
        if "use_cache" in self._parameters:
            inputs["use_cache"] = False
        if batch.ends is not None:
            inputs["attention_mask"] = _tree_mask(batch.ends, self._model.dtype)
            inputs["position_ids"] = batch.positions
        self._scored, self._selected = (batch.rows, batch.columns), False
        try:
            logits = cast(Tensor, self._model(**inputs).logits)
        finally:
            self._scored = None
        return logits[0] if self._selected else logits[batch.rows, batch.columns]

    def _select(self, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Hand the output layer the scored places only; what the model does to logits after it stays in force."""
        if self._scored is None or not args or args[0].dim() != 3:
            return None
        self._selected = True
        rows, columns = self._scored
        return (args[0][rows, columns].unsqueeze(0), *args[1:])  # [1, n_scored, hidden]


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as exc:
        raise EngineError(f"engine: device must be auto, cpu, cuda or cuda:<i>, got '{device}'; correct it") from exc
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"engine: device '{device}' is not there ({torch.cuda.device_count()} CUDA devices found); use cpu or auto"
        )
    return torch.device("cuda:0") if target.type == "cuda" and target.index is None else target


def _batch_tokens(device: torch.device, width: int) -> int:
    if device.type == "cuda":
        return CUDA_BATCH_TOKENS
    return min(1024, max(512, CPU_BATCH_ACTIVATIONS // width))


def _with_answer(lm: Any, encoded: Encoded) -> int:
    """Tokens of the longest prompt that is answered by text, and of its answer."""
    return max(len(tokens) for _, _, tokens in encoded.generated) + int(lm.max_gen_toks)


def _takes_trees(model: Any, config: Any, parameters: Any) -> bool:
    """Whether attention follows a given mask and positions: no recurrence, no distances of its own."""
    layers = set(getattr(config, "layer_types", None) or ())
    return (
        {"position_ids", "attention_mask"} <= set(parameters)
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)
        and layers <= _ATTENTION_LAYERS
    )


def _tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[n, 1, length, length]``: token i sees token j if ``j <= i < ends[j]``."""
    index = torch.arange(ends.shape[1], device=ends.device)
    seen = (index[None, :, None] >= index[None, None, :]) & (index[None, :, None] < ends[:, None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _on_device(batch: Sequence[Row], items: Sequence[Item], device: torch.device) -> _Batch:
    length = len(batch[0])
    tokens = np.zeros((len(batch), length), dtype=np.int64)
    positions = np.zeros_like(tokens)
    # padding comes last and sees what comes before it in its row's padding, so that no row of the mask is empty
    ends = np.full_like(tokens, length)
    places: dict[tuple[int, int], int] = {}
    place_of: list[int] = []
    wanted: list[int] = []
    scored: list[int] = []
    starts: list[int] = []
    for number, row in enumerate(batch):
        tokens[number, : len(row)] = row.tokens
        positions[number, : len(row)] = row.positions
        ends[number, : len(row)] = row.ends
        for item, nodes in row.scored:
            scored.append(item)
            starts.append(len(wanted))
            wanted.extend(items[item].continuation)
            place_of.extend(places.setdefault((number, node), len(places)) for node in nodes)
    where = np.array(list(places), dtype=np.int64).reshape(-1, 2)
    # attention without a mask has faster kernels
    is_tree = not all(row.is_chain for row in batch)

    def moved(array: Any) -> Tensor:
        return torch.as_tensor(array, device=device)

    return _Batch(
        tokens=moved(tokens),
        positions=moved(positions) if is_tree else None,
        ends=moved(ends) if is_tree else None,
        rows=moved(where[:, 0]),
        columns=moved(where[:, 1]),
        places=moved(np.array(place_of, dtype=np.int64)),
        wanted=moved(np.array(wanted, dtype=np.int64)),
        items=scored,
        starts=starts,
    )
