"""From a model reference, as in a study file, to the folder of the model. Does not read what is in the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optuna_merge.errors import CheckpointError, first_line
from optuna_merge.recipe import split_reference

_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")


@dataclass(frozen=True)
class ResolvedReference:
    """A model reference and the folder that it led to.

    Attributes:
        reference: As it was written.
        name: A spelling that means the same model everywhere: an absolute path, or ``org/name@commit`` for a model of
            the hub. A model with an adapter has two of them, joined with ``+``.
        path: The folder.
        is_local: Whether the reference is a folder, so that nothing was fetched from the hub.
        adapter: The model's adapter, if it has one.
    """

    reference: str
    name: str
    path: Path
    is_local: bool
    adapter: ResolvedReference | None = None

    @property
    def spellings(self) -> dict[str, str]:
        """Maps ``name``, or the names of model and adapter, to the spelling to show to others.

        That is the hub name as it was written, or the absolute path of a folder.
        """
        if self.adapter is None:
            return {self.name: self.name if self.is_local else self.reference}
        model, _ = split_reference(self.name)
        written = self.reference.removesuffix(f"+{self.adapter.reference}")
        return {model: model if self.is_local else written} | self.adapter.spellings


def resolve(reference: str, relative_to: Path | None = None) -> ResolvedReference:
    """Find the folder of a model reference; fetch the model from the hub if the reference is not a folder.

    Args:
        reference: A folder (absolute, or relative to ``relative_to``), or ``org/name`` or ``org/name@revision`` on
            the model hub. A reference that starts with ``.``, ``/`` or ``~`` is always a folder. Two references joined
            with ``+`` are a model and its adapter, unless a folder has that name.
        relative_to: Folder of the file that holds the reference; None means the working directory.

    Raises:
        CheckpointError: If neither is found; the message names both.
    """
    start = relative_to or Path.cwd()
    folder = start / Path(reference).expanduser()
    if folder.is_dir():
        absolute = folder.resolve()
        if split_reference(str(absolute))[1] is not None:
            raise CheckpointError(f"{absolute}: path must not read like a model with an adapter; rename the folder")
        return ResolvedReference(reference, str(absolute), absolute, is_local=True)
    if "+" in reference:
        splits = [(reference[:at], reference[at + 1 :]) for at, sign in enumerate(reference) if sign == "+"]
        model, adapter = next((pair for pair in splits if (start / Path(pair[0]).expanduser()).is_dir()), splits[0])
        base, added = resolve(model, start), resolve(adapter, start)
        return ResolvedReference(reference, f"{base.name}+{added.name}", base.path, base.is_local, added)
    if reference.startswith((".", "/", "~")):
        raise CheckpointError(f"model {reference!r} must be an existing folder, found none at {folder}")
    return _fetch(reference, folder)


def _fetch(reference: str, looked_at: Path) -> ResolvedReference:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_DOWNLOADED)))
    except Exception as exc:  # the hub's own errors, and those of whichever HTTP library it uses
        raise CheckpointError(
            f"model {reference!r} must be a folder or a model of the hub, but there is no folder {looked_at}, "
            f"and the hub gave none: {first_line(exc)}"
        ) from exc
    return ResolvedReference(reference, f"{name}@{path.name}", path, is_local=False)
