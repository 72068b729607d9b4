from __future__ import annotations

import pytest

from optuna_merge.checkpoints.tensor_names import Place, find_layer_stack, is_buffer, place_of
from optuna_merge.errors import CheckpointError
from optuna_merge.recipe import group_name, layer_groups


def test_the_layer_stack_is_what_stands_before_the_index() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "model.layers.1.mlp.experts.7.w1.weight"]
    assert find_layer_stack(names) == "model.layers."
    assert find_layer_stack(["h.0.ln_1.weight", "h.1.ln_1.weight", "wte.weight"]) == "h."


def test_a_decoder_is_told_from_an_encoder_beside_it() -> None:
    names = [f"vision.blocks.{i}.w" for i in range(3)] + [f"text.layers.{i}.w" for i in range(2)]
    assert find_layer_stack(names, n_layers=2) == "text.layers."
    assert find_layer_stack(names) == "text.layers."
    names = [f"encoder.{i}.w" for i in range(3)] + [f"decoder.{i}.w" for i in range(2)]
    with pytest.raises(CheckpointError, match=r"one stack of layers, found \{'decoder.': 2, 'encoder.': 3\}"):
        find_layer_stack(names)
    names += [f"decoder.{i}.{part}" for i in range(2) for part in ("up", "down")]
    assert find_layer_stack(names) == "decoder."
    with pytest.raises(CheckpointError, match=r"one stack of 2 layers, found no layer index; is this a decoder"):
        find_layer_stack(["embed.weight"], 2)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("layer", 3)),
        ("model.layers.3.mlp.experts.0.w1.weight", Place("layer", 3)),
        ("model.embed_tokens.weight", Place("embedding")),
        ("transformer.wpe.weight", Place("embedding")),
        ("gpt_neox.embed_in.weight", Place("embedding")),
        ("embed_out.weight", Place("head")),
        ("lm_head.weight", Place("head")),
        ("model.norm.weight", Place("head")),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert place_of(name, "model.layers.") == place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.rotary_emb.inv_freq", True),
        ("rotary_emb.inv_freq", True),
        ("h.0.attn.bias", True),
        ("gpt_neox.layers.0.attention.masked_bias", True),
        ("model.position_ids", True),
        ("h.0.attn.c_attn.bias", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("lm_head.bias", False),
    ],
)
def test_buffers(name: str, expected: bool) -> None:
    assert is_buffer(name) is expected


def test_groups_cover_every_layer_and_names_sort_by_depth() -> None:
    assert layer_groups(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert layer_groups(7, 0) == [(0, 7)]
    assert group_name((4, 8), 32) == "layers_04_07"
    names = [group_name(layers, 120) for layers in layer_groups(120, 7)]
    assert names == sorted(names)
