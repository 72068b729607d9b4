"""How fast a device runs a model, measured on a few of its layers with made-up weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from optuna_merge.evaluation.engines.hf_weights import factory_of
from optuna_merge.evaluation.quiet import quietly

_LAYERS = (2, 4)
_VOCABULARY = 4096
_ROW_TOKENS = 64
_PLACES = 64
_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """Seconds of a model's forward passes.

    Attributes:
        token: A token in a pass that fills the device, without its logits.
        place: The logits of one token.
    """

    token: float
    place: float


def measure_speed(
    folder: Path, *, dtype: torch.dtype, device: torch.device, batch_tokens: int, trust_remote_code: bool
) -> Speed | None:
    """Measure how fast a device runs a model, in a second or so.

    Args:
        folder: Holds the model's ``config.json``.
        dtype: Of its weights.
        device: Where it runs.
        batch_tokens: Tokens that fill a pass.
        trust_remote_code: Run model code that the folder brings.

    Returns:
        The speed; None if the model cannot be built with fewer layers.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    n_layers = int(config.get_text_config().num_hidden_layers)
    tokens = torch.zeros((max(1, batch_tokens // _ROW_TOKENS), _ROW_TOKENS), dtype=torch.long, device=device)
    times = []
    with torch.inference_mode(), quietly():
        for n in _LAYERS:
            try:
                model = _cut(config, n, dtype, device, trust_remote_code)
                times.append(_seconds(lambda model=model: model(tokens, use_cache=False), device))  # type: ignore[misc]
            except (AttributeError, TypeError, ValueError, LookupError, RuntimeError):
                return None
        hidden = int(config.get_text_config().hidden_size)
        states = torch.ones((_PLACES, hidden), dtype=dtype, device=device)
        head = torch.ones((_VOCABULARY, hidden), dtype=dtype, device=device)
        logits = _seconds(lambda: (states @ head.T).float().logsumexp(-1), device)
    layer = max(0.0, times[1] - times[0]) / (_LAYERS[1] - _LAYERS[0])
    whole = times[0] + (n_layers - _LAYERS[0]) * layer
    place = logits / _PLACES * int(config.get_text_config().vocab_size) / _VOCABULARY
    return Speed(whole / tokens.numel(), place)


def _cut(config: Any, n_layers: int, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    """The decoder of a model, without its output layer, with a few of its layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    n_all = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == n_all:
            setattr(text, key, (value * n_layers)[:n_layers])
    text.num_hidden_layers = n_layers
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    text.pad_token_id = None
    with torch.device("meta"):
        model = factory_of(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    decoder = model.get_decoder().to_empty(device=device)
    for tensor in [*decoder.parameters(), *decoder.buffers()]:
        tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    return decoder


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The least time of a few calls, after one that does not count."""
    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
