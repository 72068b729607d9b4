"""Keys and values: their type, and how much room those of a token take by a model's ``config.json``.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KeysAndValues = Sequence[tuple["Tensor", "Tensor"]]
"""Of each layer, ``[n_rows, n_heads, n_columns, head_dim]``."""


def elements_of_a_token(config: Mapping[str, Any]) -> int:
    """Elements of the keys and values of one token, over all layers; 0 if the keys of the configuration are unknown."""
    n_layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    n_heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    width = int(config.get("head_dim") or hidden // n_heads)
    return 2 * n_layers * int(config.get("num_key_value_heads") or n_heads) * width
