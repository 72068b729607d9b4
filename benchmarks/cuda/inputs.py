"""What the parts work on: models of random weights, recipes over them, and eval tasks, all made on the spot.

Knows shapes and files. Does not know what is measured.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.testing.models import write_tiny_models

N_SOURCES = 3
SPEED_METHODS = ("linear", "task_arithmetic", "dare_linear", "dare_ties", "ties", "breadcrumbs", "della")
MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
TINY = MISTRAL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 320,
}
WORDS = "cat dog mat sat ran after the and on one two three four five six seven eight nine ten letter next".split()


@dataclass
class Inputs:
    """The device, the sizes and the models on disk, shared by all parts.

    Attributes:
        device: Where models are merged and scored.
        tiny: Use small sizes everywhere.
        folder: Where models and eval tasks are written.
        shape: The models' sizes, by their names in ``config.json``.
    """

    device: torch.device
    tiny: bool
    folder: Path
    shape: dict[str, int]

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def small(self) -> Inputs:
        """The same with models of one layer."""
        return Inputs(self.device, self.tiny, self.folder / "small", self.shape | {"num_hidden_layers": 1})

    @property
    def models(self) -> list[Path]:
        """The base, then the sources. They are written on first use."""
        paths = [self.folder / f"model_{number}" for number in range(N_SOURCES + 1)]
        if not (self.folder / "complete").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_models(self, paths)
            (self.folder / "complete").touch()
        return paths

    @property
    def n_parameters(self) -> int:
        """Number of parameters of each model."""
        checkpoint = Checkpoint.open(str(self.models[0]))
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)


def fitting_shape(tiny: bool, folder: Path) -> dict[str, int]:
    """The shape of the models: that of the models in the folder, else with as many layers as the disk can hold."""
    shape = TINY if tiny else MISTRAL
    if (folder / "complete").exists():
        written = json.loads((folder / "model_0" / "config.json").read_text())
        return {key: written[key] for key in shape}
    free, n_layers = 0.9 * shutil.disk_usage(folder).free, shape["num_hidden_layers"]
    sizes = [2 * sum(map(math.prod, group.values())) for group in tensor_shapes(shape)]  # the ends, then each layer
    n_fitting = int(
        (free / (N_SOURCES + 1) - 2 * sizes[0]) // sizes[1]
    )  # twice the ends: the small models have them too
    return shape | {"num_hidden_layers": max(1, min(n_layers, n_fitting))}


def tensor_shapes(shape: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in one file after the other: embedding, head and norm, then each layer."""
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    vocabulary = (shape["vocab_size"], hidden)
    yield {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)}
    for layer in range(shape["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        yield {f"model.layers.{layer}.{part}.weight": size for part, size in parts.items()}


def write_models(inputs: Inputs, paths: list[Path]) -> None:
    """Write bfloat16 checkpoints with a tokenizer: a random base, and sources that are the base plus small noise."""
    base, _ = write_tiny_models(inputs.folder / "tokenizer", 0)
    config = json.loads((base / "config.json").read_text()) | inputs.shape
    config |= {"dtype": "bfloat16", "tie_word_embeddings": False}
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        for file in base.iterdir():
            if "token" in file.name:
                shutil.copyfile(file, path / file.name)
        (path / "config.json").write_text(json.dumps(config))
    weight_map = write_weights(inputs, paths)
    for path in paths:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_weights(inputs: Inputs, paths: list[Path]) -> dict[str, str]:
    """Draw the weights on the device and write one file for each layer.

    Returns:
        Tensor name to the file that holds it.
    """
    generator = torch.Generator(inputs.device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(tensor_shapes(inputs.shape)):
        file_name = f"model-{number + 1:05d}.safetensors"
        weight_map |= dict.fromkeys(group, file_name)
        drawn = {
            name: 0.02 * torch.randn(shape, generator=generator, device=inputs.device) for name, shape in group.items()
        }
        for index, path in enumerate(paths):
            stored = {}
            for name, tensor in drawn.items():
                noise = torch.randn(tensor.shape, generator=generator, device=inputs.device)
                norm = 1.0 if name.endswith("norm.weight") else 0.0
                stored[name] = (tensor + norm + (0.002 if index else 0) * noise).bfloat16().cpu()
            save_file(stored, path / file_name, metadata={"format": "pt"})
    return weight_map


def make_recipe(inputs: Inputs, method: str, number: int = 0) -> Recipe:
    """The merge of one trial.

    Args:
        inputs: Whose models are merged.
        method: A name in ``METHODS``.
        number: Each number gives other weights and densities.
    """
    weights, density = (0.37 + 0.001 * number, 0.91 - 0.001 * number, 0.22), 0.5 - 0.001 * number
    return weighted_recipe(inputs, method, weights, density)


def weighted_recipe(inputs: Inputs, method: str, weights: tuple[float, ...], density: float = 0.5) -> Recipe:
    """A merge with given weights, over as many sources as the method takes."""
    declared = METHODS[method]
    least, greatest = declared.n_models_for(declared.base != "none")
    sources = inputs.models[1 : 1 + min(N_SOURCES, greatest or N_SOURCES)]
    assert len(sources) >= least
    values = {"weight": weights, "density": (density,) * N_SOURCES, "epsilon": (0.1,) * N_SOURCES}
    per_model = {
        p.name: values.get(p.name, (p.default or 0.0,) * N_SOURCES)[: len(sources)]
        for p in declared.parameters
        if p.per_model
    }
    n_layers = inputs.shape["num_hidden_layers"]
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(None, {}, per_model),))
    base = None if declared.base == "none" else str(inputs.models[0])
    return Recipe(method, tuple(map(str, sources)), base, n_layers, (group,), dtype="bfloat16")


def open_merger(inputs: Inputs, recipe: Recipe, placement: Any) -> Merger:
    """A merger over a recipe's checkpoints, which it keeps at ``placement``: ``disk``, ``host`` or ``gpu``."""
    checkpoints = {reference: Checkpoint.open(reference) for reference in recipe.references}
    return Merger(checkpoints, device=inputs.device, placement=placement)


def write_tasks(inputs: Inputs) -> Path:
    """Write three eval tasks, always the same: choices of one letter, choices of several tokens, and generated text.

    Returns:
        The folder that holds them.
    """
    folder = inputs.folder / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    rnd = random.Random(0)
    n_documents, n_words = (8, 12) if inputs.tiny else (100, 100)

    def phrase(n: int) -> str:
        return " ".join(rnd.choice(WORDS) for _ in range(n))

    kinds: dict[str, Callable[[], list[str]]] = {
        "letters": lambda: ["A", "B", "C", "D"],
        "phrases": lambda: [phrase(4) for _ in range(4)],
        "generates": lambda: [phrase(1)],
    }
    for name, choices in kinds.items():
        rows = [
            {
                "text": f"Question: {phrase(n_words)}? Answer:",
                "choices": (c := choices()),
                "gold": rnd.randrange(len(c)),
            }
            for _ in range(n_documents // (4 if name == "generates" else 1))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        task = task_file(name, folder, n_generated=4 if inputs.tiny else 32)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def task_file(name: str, folder: Path, n_generated: int) -> dict[str, Any]:
    """The content of an eval task's YAML file.

    Args:
        name: Of the eval task; ``generates`` asks for text, any other offers choices.
        folder: Where ``<name>.jsonl`` lies.
        n_generated: Number of tokens to generate.
    """
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/{name}.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    if name == "generates":
        task |= {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
        task |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": n_generated}}
        metric = "exact_match"
    else:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        metric = "acc"
    task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    return task
