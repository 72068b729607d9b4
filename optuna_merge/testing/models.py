"""Tiny checkpoints that transformers can load, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
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
    """Write a random base model and fine-tunes of it: folders that transformers loads, each with a tokenizer.

    Args:
        folder: Where to write; made if it is missing.
        n_models: Number of fine-tunes.
        architecture: Architecture of all models, with two heads and 320 tokens.
        n_layers: Number of layers.
        dtype: Dtype of every stored tensor.
        tied: Whether the output head is the embedding; None: the architecture's default.
        max_shard_size: As in ``save_pretrained``.
        spread: Standard deviation of a fine-tune's difference from the base.
        head_dim: Width of a head; the model is twice as wide.

    Returns:
        ``folder/base``, and the list ``folder/model_0``, ``folder/model_1`` ...; equal arguments give equal bytes.
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
