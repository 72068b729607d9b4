"""The study's storage: how it is opened, every attribute key, and the fingerprint of a study.

Knows Optuna's storages; knows nothing of models, tasks or merges.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError, StudyMismatchError
from optuna_merge.search.samplers import PAIRED_ESTIMATE
from optuna_merge.storage import proxy
from optuna_merge.storage.batched import BatchedStorage, is_storage_error, reason
from optuna_merge.storage.journal import WholeLinesBackend
from optuna_merge.storage.lock import file_lock, has_locks, server_lock

DIRECTION: Literal["maximize"] = "maximize"
"""Of every objective; a task with a negative weight is minimised."""

FINGERPRINT = "fingerprint"
"""Study: readable name to value of everything that decides what a score means."""
REQUESTS = "prompts and documents"
"""In the fingerprint: digest of every request of the eval tasks."""
CHUNKS = "study.n_chunks"
"""In the fingerprint: parts that the documents are cut into."""
WANTED = "n_trials"
"""Study: how many trials the latest run was asked for."""
POPULATION = "population"
"""Study: trials in a generation of CMA-ES, since it was begun."""
START = "start"
"""Study: where the search began, once it has."""
WARM_START = "warm_start"
"""Study: what the study that ``search.warm_start`` names said when this one was made."""

BASELINE = "baseline"
"""Trial: name of the baseline that it scores."""
BASELINE_KIND = "baseline_kind"
"""Trial: ``uniform``, ``source`` or ``base``."""
RECIPE_DIGEST = "recipe_digest"
"""Trial: digest of the recipe that was merged."""
MERGE_SECONDS = "merge_s"
"""Trial: time to merge and to load the merged weights."""
EVALUATION_SECONDS = "evaluation_s"
"""Trial: time to score, all starts of the trial together."""
DOCUMENTS = "n_documents"
"""Trial: documents that were scored."""
FAILURE = "failure"
"""Trial: why it failed."""
SCORE = "score"
"""Trial: prefix of each task's metric, ``score <task>``; its standard error is ``stderr <task>``."""
STDERR = "stderr"

TRIAL_ATTRIBUTES = (
    BASELINE,
    BASELINE_KIND,
    RECIPE_DIGEST,
    MERGE_SECONDS,
    EVALUATION_SECONDS,
    DOCUMENTS,
    FAILURE,
    PAIRED_ESTIMATE,
)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

_LOCK_WAIT_S = 60
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
"""Those that the extras install; a URL may name another."""


def storage_url(storage_path: Path, url: str | None) -> str:
    """The Optuna URL of a study's storage: the one that was given, or an SQLite file in ``storage_path``."""
    return url or f"sqlite:///{(storage_path / 'study.db').resolve()}"


def open_storage(url: str) -> BaseStorage:
    """Open a storage, creating it where that makes sense; several processes may do so at once.

    Args:
        url: ``sqlite:///FILE``, ``journal://FILE``, ``grpc://HOST:PORT``, or any database URL that Optuna takes.

    Raises:
        StudyError: If it cannot be opened or written.
    """
    file = local_file(url)
    if file is None and url.startswith("sqlite"):
        raise StudyError(f"storage must outlive the process, got {url}; name a file, such as sqlite:///study.db")
    if url.startswith("grpc:"):
        return proxy.connect(url)
    shown = shown_url(url)
    try:
        return _open_database(url) if file is None else _open_file(url, file)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, ValueError) as exc:
        raise StudyError(f"storage {shown} must be readable and writable, got {reason(exc)}; see storage_path") from exc
    except (ImportError, RuntimeError, KeyError, TypeError) as exc:  # the last two: JSON lines that are no journal
        raise StudyError(f"storage {shown} must be a storage that Optuna can open, got {reason(exc)}") from exc


def open_study(url: str, name: str) -> optuna.Study:
    """A study that has been started, to be looked at.

    Raises:
        StudyError: If the storage cannot be opened, or holds no such study.
    """
    file = local_file(url)
    missing = (
        f"study {name!r} must have been started, {shown_url(url)} holds none of that name; start it with run-study"
    )
    if file is not None and not file.exists():
        raise StudyError(missing)
    storage = open_storage(url)
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError as exc:
        raise StudyError(missing) from exc
    except Exception as exc:
        raise storage_error(url, exc) from exc


def create_study(url: str, name: str, n_objectives: int = 1) -> tuple[optuna.Study, BatchedStorage]:
    """A study to be run, made if it does not exist, and its storage, which writes in batches and waits for outages.

    Args:
        url: As in :func:`open_storage`.
        name: The study's.
        n_objectives: Values that each trial of a new study has.

    Raises:
        StudyError: If the storage cannot be opened or written.
    """
    storage = BatchedStorage(open_storage(url), shown_url(url))
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=[DIRECTION] * n_objectives, load_if_exists=True
        )
    except Exception as exc:
        raise storage_error(url, exc) from exc
    return study, storage


def storage_error(url: str, exc: Exception) -> Exception:
    """What to raise for an error while a study runs: a line of ours if it is its storage's, else the error itself."""
    if not is_storage_error(exc):
        return exc
    return StudyError(
        f"storage {shown_url(url)} must stay writable, got {reason(exc)}; every finished trial is kept: mend it and run"
        " the same command again"
    )


def shown_url(url: str) -> str:
    """A storage URL as messages may show it: without password."""
    try:
        return sqlalchemy.engine.make_url(url).render_as_string() if "@" in url else url
    except sqlalchemy.exc.ArgumentError:
        return url


@contextmanager
def running(url: str, study_name: str, requeue: Callable[[bool], None]) -> Iterator[None]:
    """Note, for as long as the context lasts, that this process runs a study of a file.

    Args:
        url: As in :func:`open_storage`.
        study_name: The study.
        requeue: Called once, with whether no other process runs the study; until it returns, none can begin to. Of a
            database server nobody knows.
    """
    file = local_file(url)
    if file is None:
        requeue(False)
        yield
        return
    path = file.with_name(f"{file.name}.{study_name}.runners")
    try:
        with file_lock(path, wait=False):
            requeue(True)
    except BlockingIOError:
        requeue(False)
    with file_lock(path, shared=True):
        yield


def generation(trial: FrozenTrial) -> int | None:
    """The generation in which CMA-ES drew a trial, from 0 on; None if it did not."""
    found: int | None = next((value for key, value in trial.system_attrs.items() if key.endswith(":generation")), None)
    return found


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's score: its value, or the sum of its values where there are several objectives; None without any."""
    return None if trial.values is None else math.fsum(trial.values)


def n_finished(study: optuna.Study) -> int:
    """Trials that count towards ``n_trials``: complete, pruned or failed."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def recorded_fingerprint(url: str, name: str) -> Mapping[str, Any]:
    """The fingerprint that a study was started with; empty if it was not.

    Raises:
        StudyError: If the storage cannot be opened.
    """
    file = local_file(url)
    if file is not None and not file.exists():
        return {}
    storage = open_storage(url)
    try:
        if name not in optuna.get_all_study_names(storage):
            return {}
        study = optuna.load_study(storage=storage, study_name=name)
        recorded: Mapping[str, Any] = study.user_attrs.get(FINGERPRINT, {})
    except Exception as exc:
        raise storage_error(url, exc) from exc
    return recorded


def check_fingerprint(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Record what the study's scores mean, or compare with what was recorded.

    Args:
        study: The study, new or not.
        fingerprint: Readable name to a JSON value.

    Raises:
        StudyMismatchError: If the study was made otherwise; one line for each difference.
    """
    if FINGERPRINT not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StudyMismatchError(
                f"study {study.study_name!r} must be made by optuna-merge, its storage holds trials of something else;"
                " use a new study name or storage_path"
            )
        study.set_user_attr(FINGERPRINT, json.loads(json.dumps(fingerprint)))
    refuse_differences(study, fingerprint)


def refuse_differences(study: optuna.Study, fingerprint: Mapping[str, Any]) -> None:
    """Compare a fingerprint, or a part of one, with that of a study, if it has one.

    Raises:
        StudyMismatchError: With one line for each difference.
    """
    then, name = study.user_attrs.get(FINGERPRINT), study.study_name
    if then is None:
        return
    now = json.loads(json.dumps(fingerprint))
    changed = [key for key in now if then.get(key) != now[key]]
    if len(changed) > 1:  # a digest changes with what it is made of, which has been named
        changed = [key for key in changed if key != REQUESTS]
    lines = [
        f"study {name!r} was created with {key}={_shown(then.get(key))}, now it is {_shown(now[key])};"
        f" use a new study name or restore {_shown(then.get(key))}"
        for key in changed
    ]
    if lines:
        raise StudyMismatchError("\n".join(lines))


class DocumentScores:
    """What each chunk of a trial scored, document by document: a file for each trial, a line for each chunk.

    A trial that is taken up again reads back what it scored before. Values of single documents do not go to
    Optuna's storage: 1,000 of them a trial make a dashboard take 8 s to answer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, trial_number: int) -> Path:
        """The file of a trial."""
        return self._folder / f"trial_{trial_number:05d}.jsonl"

    def append(self, trial_number: int, line: str) -> None:
        """Write one chunk's line; it outlives this process at once, and the machine after :meth:`end`.

        Raises:
            StudyError: If it cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc

    def end(self, trial_number: int) -> None:
        """See the lines of a trial on disk.

        Raises:
            StudyError: If they cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc

    def begin(self, trial_number: int, digest: str, n_reported: int) -> list[str]:
        """Open the file of a trial for ``append``: keep the lines of the chunks that it reported.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe; lines made with another are dropped.
            n_reported: Chunks that the storage has a value of.

        Returns:
            The lines that were there, of a trial that reported any: first those that were kept, then those that were
            written and not reported.

        Raises:
            StudyError: If the file cannot be written.
        """
        path = self.path(trial_number)
        there: list[str] = []
        try:
            if n_reported and path.exists():
                # A torn last line may end within a character; it is dropped.
                first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
                there = lines if first == digest else []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in [digest, *there[:n_reported]]), encoding="utf-8")
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc
        return there


def local_file(url: str) -> Path | None:
    """The file behind an SQLite or journal URL; None for a database server.

    Raises:
        StudyError: If the URL is malformed.
    """
    if url.startswith("journal://"):
        return Path(url.removeprefix("journal://")).expanduser().absolute()
    if url.startswith(("sqlite:", "sqlite+")):
        try:
            database = sqlalchemy.engine.make_url(url).database
        except sqlalchemy.exc.ArgumentError as exc:
            raise StudyError(
                f"storage must be a URL such as sqlite:///study.db, got {url}; mend study.storage"
            ) from exc
        return Path(database).absolute() if database and database != ":memory:" else None
    return None


def _open_file(url: str, file: Path) -> BaseStorage:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(file.with_name(f"{file.name}.opening")):  # two that create a schema at once fail
        if url.startswith("journal://"):
            return JournalStorage(WholeLinesBackend(file))
        storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_WAIT_S}})
        _write_ahead(storage.engine)
        return storage


def _open_database(url: str) -> BaseStorage:
    scheme, _, rest = url.partition("://")
    url = f"{_DRIVERS.get(scheme, scheme)}://{rest}"
    engine = sqlalchemy.create_engine(url)
    try:
        with server_lock(engine, "schema") if has_locks(engine) else nullcontext():
            return RDBStorage(url)
    finally:
        engine.dispose()


def _write_ahead(engine: sqlalchemy.Engine) -> None:
    """SQLite's write-ahead log: readers do not wait, and a report costs 0.9 ms instead of 5.4."""

    def on_connect(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy.event.listen(engine, "connect", on_connect)
    engine.dispose()  # connections from before the listener


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
