"""Uploads an exported model to the Hugging Face hub. Knows nothing of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi

from optuna_merge.errors import ExportError


class Hub(Protocol):
    """The part of ``huggingface_hub.HfApi`` that an upload uses."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Create a repository, unless it exists."""

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> object:
        """Upload a folder's files in one commit."""


def check_name(repository: str) -> None:
    """Check the name of a repository, before a model is merged for it.

    Raises:
        ExportError: If it is not ``org/name``.
    """
    organisation, _, name = repository.partition("/")
    if not organisation or not name or "/" in name:
        raise ExportError(f"repository must be org/name, got {repository!r}; for example my-org/my-merge")


def push(folder: Path, repository: str, *, message: str, private: bool = True, hub: Hub | None = None) -> str:
    """Upload a model folder, in one commit.

    Args:
        folder: An exported model.
        repository: ``org/name``; created if it does not exist.
        message: Message of the commit.
        private: Whether a new repository is private; an existing one stays as it is.
        hub: None means the Hugging Face hub, with the user's own token.

    Returns:
        The repository's address.

    Raises:
        ExportError: If the hub refuses or does not answer.
    """
    check_name(repository)
    hub = hub or HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as exc:  # the hub's own errors, and those of whichever HTTP library it uses
        words = " ".join(str(exc).split())[:300] or type(exc).__name__
        raise ExportError(
            f"{repository}: hub must accept the upload, got {words}; see `hf auth login`. The model is in {folder}"
        ) from exc
    return f"https://huggingface.co/{repository}"
