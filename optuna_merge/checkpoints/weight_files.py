"""Which files of a model folder hold its weights: one safetensors file, or the shards that an index lists."""

from __future__ import annotations

from pathlib import Path

from optuna_merge.checkpoints.files import TensorFiles, read_json
from optuna_merge.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_CONVERT = (
    'convert it once: python -c "from transformers import AutoModelForCausalLM as M; import sys; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" {origin} {target} "
    "(a pickle can run code when it is read: do this only if you trust where the model comes from)"
)


def open_weights(folder: Path, reference: str) -> TensorFiles:
    """Open the weight files of a model; reads their headers only.

    Args:
        folder: The model's folder.
        reference: The model's name in messages.

    Raises:
        CheckpointError: If there are no weights in safetensors, a file is missing or damaged, or the index names a
            tensor that its file does not hold.
    """
    tensors = TensorFiles(_find_files(folder, reference), reference)
    _check_index(folder / INDEX_FILE, tensors)
    return tensors


def _find_files(folder: Path, reference: str) -> tuple[Path, ...]:
    index = folder / INDEX_FILE
    if index.is_file():
        return _listed_files(index)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if found := sorted(folder.glob("*.safetensors")):
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{reference}: weights must be in {SINGLE_FILE} or listed in {INDEX_FILE}, found {names}")
    if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        remedy = _CONVERT.format(origin=folder, target=folder.with_name(folder.name + "-safetensors"))
        raise CheckpointError(f"{reference}: weights must be safetensors, got the pickle {pickles[0].name}; {remedy}")
    raise CheckpointError(f"{reference}: must hold {SINGLE_FILE} or {INDEX_FILE}, found neither in {folder}")


def _listed_files(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must name the file of each tensor, got {weight_map!r}")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index}: must name existing files, missing: {', '.join(missing)}; fetch them again")
    return tuple(files)


def _check_index(index: Path, tensors: TensorFiles) -> None:
    if not index.is_file():
        return
    listed = read_json(index)["weight_map"]
    if missing := [name for name in listed if name not in tensors]:
        raise CheckpointError(f"{index}: {missing[0]} must be in {listed[missing[0]]}, which does not hold it")
