"""What the dashboard offers as files: each trial's merge file and document scores, and a study's held-out answers."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import storage_of, study_id
from optuna_merge.report.answers import shown_documents
from optuna_merge.report.summary import summarize
from optuna_merge.storage.outages import reason

FOLDER = "artifacts"
"""Name of the folder of the artifacts, in the study's folder."""


def artifact_storage(config: StudyConfig) -> FileSystemArtifactStore:
    """The folder of a study's artifacts, as Optuna's artifact store.

    Raises:
        StudyError: If the folder cannot be made.
    """
    folder = config.storage_path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StudyError(
            f"{folder}: artifacts must be writable, got {reason(exc)}; choose another storage_path"
        ) from exc
    return FileSystemArtifactStore(str(folder))


def upload_missing(
    study: optuna.Study,
    trial: FrozenTrial,
    artifacts: FileSystemArtifactStore,
    merge_file: Callable[[FrozenTrial], str],
    documents: Path,
) -> None:
    """Give a trial those of its artifacts that it does not have yet.

    Args:
        study: The study.
        trial: A trial of the study.
        artifacts: Where the artifacts go.
        merge_file: Returns the mergekit file of a trial.
        documents: The trial's file of document scores.

    Raises:
        OSError: If a file cannot be read or written.
    """
    uploaded = {
        json.loads(value)["filename"] for key, value in trial.system_attrs.items() if key.startswith("artifacts:")
    }
    with TemporaryDirectory(prefix="optuna-merge-") as folder:
        merge, scores = Path(folder, "mergekit.yaml"), Path(folder, "documents.csv")
        if merge.name not in uploaded:
            merge.write_text(merge_file(trial), encoding="utf-8")
            _upload(study, trial, artifacts, merge, "text/plain")
        if scores.name not in uploaded:
            write_documents(documents, scores)
            _upload(study, trial, artifacts, scores, "text/csv")


def upload_answers(study: optuna.Study, config: StudyConfig) -> None:
    """Give a study the answers to all its held-out documents as an artifact, unless it has them already.

    A finished trial takes no artifacts any more, so they are the study's; a line is a document, as ``answers --json``
    shows it.

    Args:
        study: The study; nothing happens while its answers are not kept.
        config: Its study file.

    Raises:
        StudyError: If a file cannot be read or written.
    """
    documents = shown_documents(study, summarize(study, config), config)
    text = "".join(f"{json.dumps(asdict(document))}\n" for document in documents)
    store = artifact_storage(config)
    known = [
        json.loads(value)["artifact_id"]
        for key, value in storage_of(study).get_study_system_attrs(study_id(study)).items()
        if key.startswith("artifacts:")
    ]
    try:
        files = [config.storage_path / FOLDER / name for name in known]
        if not text or text in [file.read_text(encoding="utf-8") for file in files if file.exists()]:
            return
        with TemporaryDirectory(prefix="optuna-merge-") as folder:
            table = Path(folder, "answers.jsonl")
            table.write_text(text, encoding="utf-8")
            upload_artifact(
                artifact_store=store,
                file_path=str(table),
                study_or_trial=study,
                mimetype="application/jsonl",
            )
    except OSError as exc:
        raise StudyError(f"{config.storage_path / FOLDER}: answers must be writable, got {reason(exc)}") from exc


def write_documents(scores: Path, table: Path) -> None:
    """Write the document scores of a trial as a CSV table with a row for each document of a task.

    Args:
        scores: The trial's file in ``documents/``.
        table: CSV file to write; its columns are chunk, task, document, and one for each metric.

    Raises:
        OSError: If a file cannot be read or written.
    """
    rows: list[tuple[int, str, Any, dict[str, Any]]] = []
    metrics: dict[str, None] = {}
    for line in scores.read_text(encoding="utf-8").splitlines()[1:]:  # the first line is the digest
        chunk = json.loads(line)
        for task, columns in chunk["documents"].items():
            names = [name for name in columns if name != "doc_id"]
            metrics |= dict.fromkeys(names)
            for index, document in enumerate(columns["doc_id"]):
                rows.append((chunk["chunk"], task, document, {name: columns[name][index] for name in names}))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["chunk", "task", "document", *metrics])
        writer.writerows(
            [number, task, document, *(values.get(name, "") for name in metrics)]
            for number, task, document, values in rows
        )


def _upload(
    study: optuna.Study, trial: FrozenTrial, artifacts: FileSystemArtifactStore, file: Path, mimetype: str
) -> None:
    upload_artifact(
        artifact_store=artifacts,
        file_path=str(file),
        study_or_trial=trial,
        storage=storage_of(study),
        mimetype=mimetype,
    )
