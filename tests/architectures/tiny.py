"""Tiny random models of every causal architecture of transformers.

A configuration is the architecture's default one with every size replaced by a small one, by the name of its key. What
that does not make consistent is in ``OVERRIDES``.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from optuna_merge.testing.models import _tiny_tokenizer

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VISION_TYPES = tuple(sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))

LANGUAGE_TYPES = {
    # where transformers has no causal model of the language part's own type
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}

N_LAYERS = 4
HIDDEN, N_HEADS, N_KV_HEADS, HEAD_DIM = 32, 4, 2, 8
WINDOW = 16

_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", 320),
    (
        r"hidden_size|d_model|n_embd|dim_model|embedding_size|word_embed_proj_dim|emb_dim|lru_width|embedding_dim",
        HIDDEN,
    ),
    (r"(mamba_)?attention_hidden_size|backbone_hidden_size|input_embedding_size|output_embedding_size", HIDDEN),
    (r"(moe_)?(shared_)?(expert_)?(intermediate|ffn_hidden)_size(_mlp)?|n_inner|ffn_dim|dff|dim_ff|d_inner", 48),
    (
        r"(encoder|decoder)_ffn_dim|ffn_hidden_size|feed_forward_size|(shared|dense|prefix_dense)_\w*intermediate_size",
        48,
    ),
    (r"(encoder|decoder)_layers|num_(hidden|encoder|decoder)_layers|n_layers?|num_layers|num_blocks", N_LAYERS),
    (r"(num|n|swa_num)_(attention_)?heads|n_head|\w*coder_attention_heads|n_mamba_heads", N_HEADS),
    (r"mamba_n_heads|mamba_num_heads|index_n_heads", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"linear_num_(key|value)_heads|num_query_groups", 2),
    (r"(num_key_value|swa_num_key_value|num_kv)_heads", N_KV_HEADS),
    (
        r"(attention_|swa_)?head_dim|kv_channels|d_head|dim_head|attention_head_size|mamba_(d_head|head_dim|headdim)",
        HEAD_DIM,
    ),
    (r"global_head_dim|(linear_key|linear_value|linear|index)_head_dim|v_head_dim|qk_nope_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|adapter_rank|gated_norm_rank|hidden_size_per_layer_input", 8),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers", 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_target_positions",
        128,
    ),
    (
        r"sliding_window|sliding_window_size|attention_window_size|window_size|local_attention|attention_chunk_size",
        WINDOW,
    ),
    (r"state_size|mamba_d_state|ssm_state_size|mamba_dt_rank|time_step_rank", 8),
    (r"chunk_size|mamba_chunk_size|index_topk", 16),
    (r"image_size", 8),
    (r"patch_size", 4),
)
_LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks"
_LEFT_OUT = set(
    "transformers_version architectures model_type dtype _name_or_path id2label label2id per_layer_config".split()
)
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_ZAMBA = {
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}
_DOTS3 = {
    "head_dim": 16,
    # With 8 heads some tokens score exactly 0, and which of these equals torch.topk keeps depends on a row's padding.
    "index_n_heads": 32,
    "per_layer_config": {
        i: {"num_attention_heads": 2, "num_key_value_heads": 2, "qk_nope_head_dim": 12} for i in (2, 3)
    },
}

_GEMMA3N = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_GEMMA3N |= {"intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
_QWEN4 |= {"indexer_compress_ratio": 4}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

OVERRIDES: dict[str, dict[str, Any]] = {
    # None: leave the key out; a slash leads into a section
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}, "ffn_config/moe_top_k": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {f"text_config/{key}": value for key, value in _DOTS3.items()}
    | {"vision_config/adapter_in_dim": 32, "audio_config/whisper_adapter_in_dim": 32},
    "dots3_note_text": _DOTS3,
    "gemma3n": {f"text_config/{key}": value for key, value in _GEMMA3N.items()},
    "gemma3n_text": _GEMMA3N,
    "gemma4_assistant": {"text_config/hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_vl": {"text_config/rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config/rope_parameters": _MROPE},
    "qwen4_exp": {f"text_config/{key}": value for key, value in _QWEN4.items()},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16], "local_attn_chunk_length": 8}
    | {"lsh_attn_chunk_length": 8, "num_buckets": 4},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 100},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"mamba_headdim": 16, "hybrid_layer_ids": [1, 3], "kv_channels": 16, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> Any:
    """A small configuration of an architecture, as different in its layers as the default one."""
    kind = CONFIG_MAPPING[model_type]
    default = kind().to_dict()
    given = _shrunk(default)
    given |= {key: value for key, value in {**_TOKENS, "is_decoder": True}.items() if key in default}
    for key, value in OVERRIDES.get(model_type, {}).items():
        *path, last = key.split("/")
        section = given
        for part in path:
            section = section[part]
        if value is None and last in section:
            del section[last]
        else:
            section[last] = value
    return kind(**given)


def tiny_model(model_type: str) -> PreTrainedModel:
    """A model of random weights, equal each time."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def write_models(model_type: str, folder: Path, n_models: int = 2) -> list[Path]:
    """Write ``base`` and fine-tunes of it, ``model_0`` ..., each with a tokenizer."""
    base = tiny_model(model_type)
    paths = []
    tokenizer = _tiny_tokenizer()
    for number in range(-1, n_models):
        generator = torch.Generator().manual_seed(number + 1)
        model = base if number < 0 else copy.deepcopy(base)
        for parameter in model.parameters():
            parameter.data += (0.2 if number < 0 else 0.1) * torch.randn(parameter.shape, generator=generator)
        path = folder / ("base" if number < 0 else f"model_{number}")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(path)
    return paths


def write_vision_models(model_type: str, folder: Path, *, tied: bool | None = None) -> tuple[Path, list[Path]]:
    """Write a vision-language model, and two language models of the shape of its language part.

    Args:
        model_type: Of the vision-language model.
        folder: Where to write.
        tied: Whether the language models' head is the embedding; None: as in the vision-language model.

    Returns:
        ``folder/whole``, and ``folder/language_0`` and ``folder/language_1``, each with a tokenizer.
    """
    config = tiny_config(model_type)
    text = config.get_text_config().to_dict()
    kind = CONFIG_MAPPING[LANGUAGE_TYPES.get(model_type, text["model_type"])]
    language = kind(**{key: value for key, value in text.items() if key not in _LEFT_OUT})
    language.tie_word_embeddings = getattr(config, "tie_word_embeddings", False) if tied is None else tied
    tokenizer = _tiny_tokenizer()
    paths = []
    for number, name in enumerate(("whole", "language_0", "language_1")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            factory: Any = AutoModelForCausalLM if number else AutoModelForImageTextToText
            model = factory.from_config(language if number else config)
            for parameter in model.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths.append(folder / name)
    (paths[0] / "preprocessor_config.json").write_text('{"do_resize": true}')
    return paths[0], paths[1:]


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    n_layers = next((n for key, n in config.items() if re.fullmatch(_LAYERS, key) and isinstance(n, int)), None)
    small = {key: _small(key, value, n_layers) for key, value in config.items() if key not in _LEFT_OUT}
    if config.get("kv_lora_rank"):  # latent attention has as many heads of keys as of queries
        small["num_key_value_heads"] = N_HEADS
        if config.get("head_dim") == config["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]
        small.pop("qk_head_dim", None)
    return small


def _small(key: str, value: Any, n_layers: int | None) -> Any:
    if isinstance(value, dict) and "model_type" in value:
        small = _shrunk(value)
        return {**small, "model_type": value["model_type"]}
    if isinstance(value, dict) and key.endswith("_config"):
        return _shrunk(value)
    if isinstance(value, list) and len(value) == n_layers:
        return _first_layers(value)
    if isinstance(value, int) and not isinstance(value, bool) and (size := _size(key)) is not None and value > 0:
        return size
    if key.endswith("_token_id") and isinstance(value, int):
        return min(value, 300)
    return value


def _size(key: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)


def _first_layers(values: list[Any]) -> list[Any]:
    """Four layers of all kinds that there are."""
    kinds = list(dict.fromkeys(map(repr, values)))
    first = values[:N_LAYERS]
    missing = [value for value in values if repr(value) not in map(repr, first)]
    for place, kind in zip(range(N_LAYERS - 1, 0, -1), dict.fromkeys(map(repr, missing)), strict=False):
        first[place] = next(value for value in values if repr(value) == kind)
    assert len(kinds) > N_LAYERS or len(dict.fromkeys(map(repr, first))) == len(kinds)
    return first
