"""A model reference in a study file to the folder it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optuna_merge.errors import CheckpointError
from optuna_merge.recipe import split_reference

_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")


@dataclass(frozen=True)
class ResolvedReference:
    """A model reference and the folder that it led to.

    Attributes:
        reference: As somebody wrote it.
        name: The same model for any reader: an absolute path, or ``org/name@commit`` for a model of the hub; two of
            them, joined with ``+``, for a model with an adapter.
        path: The folder.
        is_local: Whether it was a folder from the start, and not fetched from the hub.
        adapter: Of the model, if it has one.
    """

    reference: str
    name: str
    path: Path
    is_local: bool
    adapter: ResolvedReference | None = None

    @property
    def spellings(self) -> dict[str, str]:
        """``name``, or the names of model and adapter, to what a reader elsewhere should be told.

        That is a hub name as it was written, or the absolute path of a folder.
        """
        if self.adapter is None:
            return {self.name: self.name if self.is_local else self.reference}
        model, _ = split_reference(self.name)
        written = self.reference.removesuffix(f"+{self.adapter.reference}")
        return {model: model if self.is_local else written} | self.adapter.spellings


def resolve(reference: str, relative_to: Path | None = None) -> ResolvedReference:
    """Find the folder that a model reference means; fetch it from the hub if it is no folder.

    Args:
        reference: A folder (absolute, or relative to ``relative_to``), or ``org/name`` or ``org/name@revision`` on
            the model hub. What starts with ``.``, ``/`` or ``~`` is always a folder. Two of them joined with ``+``
            are a model and its adapter, unless there is a folder of that name.
        relative_to: Folder of the file that holds the reference; None: the working directory.

    Raises:
        CheckpointError: If it is neither; the message names both readings.
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = reference.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(
            f"model {reference!r} must be a folder or a model of the hub, but there is no folder {looked_at}, "
            f"and the hub gave none: {reason}"
        ) from exc
    return ResolvedReference(reference, f"{name}@{path.name}", path, is_local=False)
