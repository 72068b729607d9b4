"""The tokenizer in a model folder: its files, its vocabulary, and the object that transformers makes of it.

Knows nothing of embeddings: which row a token has is for ``vocabulary`` to say.
"""

from __future__ import annotations

import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

from optuna_merge.errors import CheckpointError, first_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that a tokenizer may consist of."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files that say how images and sound become input, beside a tokenizer."""

_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")  # one of them makes a tokenizer without tokenizer.json


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a folder holds any file of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_vocabulary(folder: Path, reference: str) -> dict[str, int] | None:
    """Token to id, added tokens included, as the tokenizer itself numbers them.

    Args:
        folder: The folder of the tokenizer.
        reference: The model's name in messages.

    Returns:
        None if the folder holds no tokenizer.

    Raises:
        CheckpointError: If the tokenizer cannot be read.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        try:
            vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except Exception as exc:  # tokenizers raises no class of its own
            raise CheckpointError(
                f"{file}: must hold a tokenizer, got: {first_line(exc)}; fetch the model again"
            ) from exc
        return dict(sorted(vocabulary.items(), key=itemgetter(1)))  # tokenizers gives them in any order
    if not any((folder / name).is_file() for name in _SLOW_FILES):
        return None
    return dict(load_tokenizer(folder, reference).get_vocab())


def load_tokenizer(folder: Path, reference: str) -> Any:
    """The tokenizer as transformers loads it.

    Args:
        folder: The folder of the tokenizer.
        reference: The model's name in messages.

    Raises:
        CheckpointError: If transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as exc:
        raise CheckpointError(f"{reference}: tokenizer must be loadable, got: {exc}") from exc


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the files of a tokenizer into an existing folder."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
