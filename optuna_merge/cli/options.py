"""Options that several commands share, and what they lead to: overrides of the study file, and the study itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config.study_config import StudyConfig

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C."""

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Study file (YAML), such as studies/quickstart.yaml.")]
StoragePath = Annotated[
    Path | None, typer.Option("--storage-path", metavar="DIR", help="Folder for everything that the study writes.")
]
StorageUrl = Annotated[
    str | None, typer.Option("--storage", metavar="URL", help="Optuna storage; default: an SQLite file in that folder.")
]
TaskSearchPath = Annotated[
    list[Path] | None,
    typer.Option("--task-search-path", metavar="DIR", help="Folder with eval tasks; repeat it for several folders."),
]
Seed = Annotated[
    int | None, typer.Option("--random-seed", "--seed", metavar="N", help="Seed of everything random in the study.")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Also write an HTML page with pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def overrides_of(
    storage_path: Path | None = None,
    storage: str | None = None,
    task_search_path: Sequence[Path] | None = None,
    seed: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What options replace in the study file: dotted key to value.

    Args:
        storage_path: Relative to the working directory, as are the other paths given on the command line.
        storage: As given on the command line.
        task_search_path: As given on the command line.
        seed: As given on the command line.
        more: Dotted key to the value of another option; None if the option was not given.
    """
    from optuna_merge.config.paths import absolute_storage

    given = {
        "storage_path": storage_path and storage_path.absolute(),
        "study.storage": storage and absolute_storage(storage, Path.cwd()),
        "task_search_path": [path.absolute() for path in task_search_path] if task_search_path else None,
        "study.seed": seed,
        **(more or {}),
    }
    return {key: value for key, value in given.items() if value is not None}


def open_study_file(
    file: Path,
    storage_path: Path | None = None,
    storage: str | None = None,
    task_search_path: Sequence[Path] | None = None,
    seed: int | None = None,
) -> tuple[StudyConfig, optuna.Study]:
    """A study file with the options that replace some of it, and its study, which must have been started.

    Raises:
        ConfigError: If the study file cannot be used.
        StudyError: If the study has not been started.
    """
    from optuna_merge.config.read import load_study

    config = load_study(file, overrides_of(storage_path, storage, task_search_path, seed))
    return config, open_started(config)


def open_started(config: StudyConfig) -> optuna.Study:
    """The study of a study file, which must have been started.

    Raises:
        StudyError: If the study has not been started.
    """
    import optuna

    from optuna_merge.storage.open import open_study, storage_url

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # our own lines say the same
    return open_study(storage_url(config.storage_path, config.study.storage), config.study.name)


def export_line(file: Path, storage_path: Path | None, storage: str | None, seed: int | None) -> str:
    """The command line that exports the best merge of a study that was run with these options."""
    options = {"--storage-path": storage_path, "--storage": storage, "--random-seed": seed}
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    return shlex.join(["optuna-merge", "export", str(file), "OUT", *given])
