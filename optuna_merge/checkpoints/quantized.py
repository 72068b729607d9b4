"""Quantized checkpoints: refused, with the way to plain weights where transformers has one.

Knows ``quantization_config``, the key of ``config.json``; not how weights are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna_merge.errors import CheckpointError

_CLASSES = {  # of transformers, that undo their kind while loading
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
_UNDONE_AFTERWARDS = ("bitsandbytes", "higgs")
_COMMAND = (
    'dequantize it once: python -c "import sys, transformers as t; a, b = sys.argv[1:]; '
    "t.AutoModelForCausalLM.from_pretrained(a, dtype='bfloat16'{option}){call}.save_pretrained(b); "
    't.AutoTokenizer.from_pretrained(a).save_pretrained(b)" {origin} {target}'
)


def refuse_quantized(config: Mapping[str, Any], folder: Path, reference: str) -> None:
    """Refuse a model whose weights are quantized: their numbers mean nothing without their scales.

    Args:
        config: Content of ``config.json``.
        folder: The model's folder.
        reference: The model's name in messages.

    Raises:
        CheckpointError: If they are.
    """
    given = config.get("quantization_config")
    if not given:
        return
    method = str(given.get("quant_method", "unknown")) if isinstance(given, Mapping) else "unknown"
    if method in _CLASSES or method in _UNDONE_AFTERWARDS:
        option = f", quantization_config=t.{_CLASSES[method]}(dequantize=True)" if method in _CLASSES else ""
        call = "" if method in _CLASSES else ".dequantize()"
        target = folder.with_name(f"{folder.name}-bfloat16")
        remedy = _COMMAND.format(option=option, call=call, origin=folder, target=target)
    else:
        remedy = "merge the model from which it was made; transformers has no way back"
    raise CheckpointError(f"{reference}: weights must not be quantized, got {method}; {remedy}")
