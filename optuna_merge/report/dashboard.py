"""The study in optuna-dashboard: its note, pictures and artifacts, and the server.

Everything lies in the study's own storage and folder, so that a plain ``optuna-dashboard`` shows it too. No torch.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import setup_testing_defaults

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.trial import FrozenTrial

from optuna_merge.config.sections import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import known_state, storage_of, study_id, trial_id
from optuna_merge.report.pictures import pictures
from optuna_merge.report.plotly import _Figure, plotly
from optuna_merge.report.summary import Summary, markdown_table, standing, summarize
from optuna_merge.storage import attributes
from optuna_merge.storage.documents import DocumentScores
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.storage.outages import reason
from optuna_merge.storage.trials import score_of
from optuna_merge.study.watcher import Watcher

ARTIFACTS = "artifacts"
"""Folder of the artifacts, in the study's folder."""
_NOTE = "optuna_merge:note"
"""Study, system attribute: digest of the note that we wrote last; another one is a reader's own and is left alone."""
_SHARE = 100
"""A refresh waits for as many times what the last one took: at most 1 % of the time goes into them."""
_SECONDS = 20.0


def refresh(study: optuna.Study, config: StudyConfig) -> None:
    """Write the study's note and pictures into its storage, where they have changed.

    Args:
        study: The study, running or not.
        config: Its study file.
    """
    import optuna_dashboard

    summary = summarize(study, config)
    noted = storage_of(study).get_study_system_attrs(study_id(study))
    text = study_note(summary, config)
    there = optuna_dashboard.get_note(study)
    if there != text and (not there or _digest(there) == noted.get(_NOTE)):
        optuna_dashboard.save_note(study, text)
        storage_of(study).set_study_system_attr(study_id(study), _NOTE, _digest(text))
    saved = _saved_plots(noted)
    for order, picture in enumerate(pictures(study, summary, config), start=1):
        key, figure = f"{order}-{picture.key}", _Figure(plotly(picture))
        if saved.get(key) != figure.to_json():
            optuna_dashboard.save_plotly_graph_object(study, figure, graph_object_id=key)


def study_note(summary: Summary, config: StudyConfig) -> str:
    """What somebody who finds the study in the dashboard should know, in markdown."""
    genome = config.genome
    tasks = ["| task | weight | metric |", "| --- | ---: | --- |"]
    tasks += [f"| {task.name} | {task.weight:g} | {task.metric} |" for task in config.tasks]
    finished = sum(summary.states.get(state, 0) for state in ("complete", "pruned", "fail"))
    models = [f"- `{model}`" for model in config.sources]
    models += [f"- base: `{genome.base_model}`"] if genome.base_model else []
    sections = [
        f"# {config.question or summary.study}",
        f"**{standing(summary)}**",
        f"{finished} of {max(finished, summary.n_trials)} trials finished"
        f" ({', '.join(f'{count} {state}' for state, count in sorted(summary.states.items()))});"
        f" {summary.n_documents:,} documents scored in {summary.seconds / 60:.1f} minutes.",
        "## What is merged",
        f"By `{genome.merge_method}`, layer granularity {genome.layer_granularity}:\n\n" + "\n".join(models),
        "## What is scored",
        "\n".join(tasks) + "\n\nThe score is the sum of weight x metric.",
        markdown_table(summary).replace("## Results of study", "## What to beat, and the best merge: study"),
        "## To go on with it",
        f"```sh\noptuna-merge run-study {config.path}\noptuna-merge report {config.path}\n"
        f"optuna-merge export {config.path} OUT\n```",
        "A trial whose attribute `baseline` is set is a source, the base or a uniform merge, scored before the search."
        " A pruned trial was worse than the best one on the chunks that both were scored on; `paired_estimate` is what"
        " it would probably have scored. Each trial's artifacts: its merge as a mergekit file, and the score of every"
        " document.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


class DashboardWatcher(Watcher):
    """Keeps the dashboard fresh while a study runs, and gives each trial its artifacts.

    Note and pictures are written at a new best merge and every 20 seconds, and never sooner than 100 times what the
    last writing took, so that at most 1 % of the run goes into them. A file that cannot be written is reported once
    and stops nothing.

    Args:
        config: The study file.
        merge_file: A trial to its mergekit YAML.
        warn: Is told what cannot be written, once.
    """

    def __init__(
        self, config: StudyConfig, merge_file: Callable[[FrozenTrial], str], warn: Callable[[str], None]
    ) -> None:
        self._config = config
        self._merge_file = merge_file
        self._warn = warn
        self._artifacts = artifact_store(config)
        self._next = 0.0
        self._next_best = 0.0
        self._warned = False
        self._best: float | None = None

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Write note and pictures."""
        self._best = summarize(study, self._config).best_value
        self._refresh(study)

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Upload the trial's merge file and the scores of its documents."""
        frozen = known_state(trial)  # reading it would write what waits to be, and take longer than the upload
        if attributes.FAILURE in frozen.user_attrs:
            return
        there = {
            json.loads(value)["filename"] for key, value in frozen.system_attrs.items() if key.startswith("artifacts:")
        }
        documents = DocumentScores(self._config.storage_path / "documents" / study.study_name)
        try:
            with TemporaryDirectory(prefix="optuna-merge-") as folder:
                merge, scores = Path(folder, "mergekit.yaml"), Path(folder, "documents.csv")
                if merge.name not in there:
                    merge.write_text(self._merge_file(frozen), encoding="utf-8")
                    self._upload(study, frozen, merge)
                if scores.name not in there:
                    write_documents(documents.path(trial.number), scores)
                    self._upload(study, frozen, scores)
        except OSError as exc:
            self._warn_once(f"artifacts of trial {trial.number} cannot be written: {reason(exc)}")

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Say what a new best merge is better than; refresh note and pictures if it is time."""
        if is_best:
            self._note_best(study, trial)
        now = time.monotonic()
        if now >= (self._next_best if is_best else self._next):
            self._refresh(study)

    def study_closed(self, study: optuna.Study) -> None:
        """Write note and pictures."""
        self._refresh(study)

    def _refresh(self, study: optuna.Study) -> None:
        start = time.monotonic()
        try:
            with (self._config.storage_path / ARTIFACTS / "refresh.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                refresh(study, self._config)
        except BlockingIOError:
            pass  # another worker of this study is at it
        except OSError as exc:
            self._warn_once(f"note and pictures cannot be refreshed: {reason(exc)}")
        end = time.monotonic()
        self._next_best = end + _SHARE * (end - start)
        self._next = max(self._next_best, end + _SECONDS)

    def _note_best(self, study: optuna.Study, trial: FrozenTrial) -> None:
        import optuna_dashboard

        score = score_of(trial)
        assert score is not None
        before = "" if self._best is None else f", {score - self._best:+.4f} on the best before it"
        self._best = score
        summary = summarize(study, self._config)
        tasks = next((row.tasks for row in summary.rows if row.trial == trial.number), {})
        lines = [f"**New best merge: {score:.4f}{before}.** {standing(summary)}", ""]
        lines += [f"- {name}: {figure.value:.4f}" for name, figure in tasks.items()]
        # save_note reads no more of a trial than this; a FrozenTrial has no storage
        written_to = SimpleNamespace(storage=storage_of(study), study=study, _trial_id=trial_id(trial))
        optuna_dashboard.save_note(written_to, "\n".join(lines))

    def _upload(self, study: optuna.Study, trial: FrozenTrial, file: Path) -> None:
        upload_artifact(
            artifact_store=self._artifacts,
            file_path=str(file),
            study_or_trial=trial,
            storage=storage_of(study),
            mimetype="text/csv" if file.suffix == ".csv" else "text/plain",
        )

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)


def artifact_store(config: StudyConfig) -> FileSystemArtifactStore:
    """Where a study's artifacts lie.

    Raises:
        StudyError: If the folder cannot be made.
    """
    folder = config.storage_path / ARTIFACTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StudyError(
            f"{folder}: artifacts must be writable, got {reason(exc)}; choose another storage_path"
        ) from exc
    return FileSystemArtifactStore(str(folder))


def write_documents(source: Path, target: Path) -> None:
    """The document scores of a trial as a table: chunk, eval task, document, and its values, a row each.

    Args:
        source: The trial's file in ``documents/``.
        target: CSV file to write.

    Raises:
        OSError: If one cannot be read or written.
    """
    rows: list[list[Any]] = []
    values: list[str] = []
    for line in source.read_text(encoding="utf-8").splitlines()[1:]:
        chunk = json.loads(line)
        for task, columns in chunk["documents"].items():
            names = [name for name in columns if name != "doc_id"]
            values += [name for name in names if name not in values]
            for index, document in enumerate(columns["doc_id"]):
                found = {name: columns[name][index] for name in names}
                rows.append([chunk["chunk"], task, document, found])
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["chunk", "task", "document", *values])
        writer.writerows([*row[:3], *(row[3].get(name, "") for name in values)] for row in rows)


@dataclass(frozen=True)
class Server:
    """A dashboard that is about to be served; ``url`` is the study's page."""

    url: str
    server: WSGIServer

    def serve(self) -> None:
        """Answer until interrupted."""
        with self.server:
            self.server.serve_forever()


def make_dashboard(config: StudyConfig, host: str = "127.0.0.1", port: int = 8080) -> Server:
    """The dashboard of a started study, bound to its port.

    Args:
        config: The study file.
        host: Address to listen on. The dashboard has no passwords and can delete studies: whoever reaches it may.
        port: In [0, 65535]; 0: any that is free.

    Raises:
        StudyError: If the study has not been started, or the port cannot be had.
    """
    import optuna_dashboard

    study = open_study(storage_url(config.storage_path, config.study.storage), config.study.name)
    app = optuna_dashboard.wsgi(storage_of(study), artifact_store=artifact_store(config))
    _ask(app, f"/api/studies/{study_id(study)}")  # it keeps what is finished: the first page then answers like the next
    try:
        server = make_server(host, port, app, server_class=_ThreadingServer, handler_class=_QuietHandler)
    except (OSError, OverflowError) as exc:
        raise StudyError(
            f"{host}:{port}: must be an address to listen on, got {reason(exc)}; choose another --port"
        ) from exc
    return Server(f"http://{host}:{server.server_port}/dashboard/studies/{study_id(study)}", server)


def _ask(app: Any, path: str) -> None:
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    b"".join(app(environ | {"PATH_INFO": path}, lambda *_: None))


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def _saved_plots(noted: Mapping[str, Any]) -> dict[str, str]:
    """Plot to its JSON, put together from the pieces that the dashboard cuts it into."""
    pieces: dict[str, dict[int, str]] = {}
    for key, value in noted.items():
        if key.startswith("dashboard:plot_data:"):
            name, _, number = key.removeprefix("dashboard:plot_data:").rpartition(":")
            pieces.setdefault(name, {})[int(number)] = value
    return {name: "".join(found[number] for number in sorted(found)) for name, found in pieces.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
