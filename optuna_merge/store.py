"""The study's storage: how it is opened and locked, every attribute key, and what becomes of lost trials.

Knows Optuna's storages; knows nothing of models, tasks or merges.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError, StudyLockedError, StudyMismatchError
from optuna_merge.sampler import PAIRED_ESTIMATE

DIRECTION: Literal["maximize"] = "maximize"
"""Of every study; a task with a negative weight is minimised."""

FINGERPRINT = "fingerprint"
"""Study: readable name to value of everything that decides what a score means."""
REQUESTS = "prompts and documents"
"""In the fingerprint: digest of every request of the eval tasks."""
CHUNKS = "study.n_chunks"
"""In the fingerprint: parts that the documents are cut into."""
WANTED = "n_trials"
"""Study: how many trials the latest run was asked for."""
START = "start"
"""Study: where the search began, once it has."""

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
OWNER = "optuna_merge:owner"
"""Trial, system attribute: the process that runs it."""

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


@dataclass(frozen=True)
class Owner:
    """A process that runs trials.

    Attributes:
        host: Its machine.
        pid: Its number there.
        started: When it started, in the kernel's clock ticks after boot: tells it from a later process with its
            number.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def me(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _start_ticks(os.getpid()) or 0)

    @property
    def is_gone(self) -> bool:
        """Whether it surely runs no more; a process of another machine is never sure to."""
        return self.host == socket.gethostname() and _start_ticks(self.pid) != self.started


def storage_url(storage_path: Path, url: str | None) -> str:
    """The Optuna URL of a study's storage: the one that was given, or an SQLite file in ``storage_path``."""
    return url or f"sqlite:///{(storage_path / 'study.db').resolve()}"


def open_storage(url: str) -> BaseStorage:
    """Open a storage, creating it where that makes sense.

    Args:
        url: ``sqlite:///FILE``, ``journal://FILE``, or any database URL that Optuna takes.

    Raises:
        StudyError: If it cannot be opened or written.
    """
    file = local_file(url)
    if file is None and url.startswith("sqlite"):
        raise StudyError(f"storage must outlive the process, got {url}; name a file, such as sqlite:///study.db")
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        if url.startswith("journal://"):
            assert file is not None
            backend = JournalFileBackend(str(file))
            journal = JournalStorage(backend)
            _cut_torn_line(file, backend)
            return journal
        engine_options: dict[str, Any] = {"connect_args": {"timeout": _LOCK_WAIT_S}} if file is not None else {}
        storage = RDBStorage(url, engine_kwargs=engine_options)
        if file is not None:
            _write_ahead(storage.engine)
        return storage
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError, ValueError) as exc:
        raise StudyError(f"storage {url} must be readable and writable, got {reason(exc)}; see storage_path") from exc
    except (ImportError, RuntimeError, KeyError, TypeError) as exc:  # the last two: JSON lines that are no journal
        raise StudyError(f"storage {url} must be a storage that Optuna can open, got {reason(exc)}") from exc


def open_study(url: str, name: str, *, create: bool) -> optuna.Study:
    """A study in its storage, without sampler and pruner.

    Args:
        url: As in :func:`open_storage`.
        name: Its name there.
        create: Whether to make it if it does not exist.

    Raises:
        StudyError: If the storage cannot be opened, or holds no such study.
    """
    file = local_file(url)
    missing = f"study {name!r} must have been started, {url} holds none of that name; start it with run-study"
    if not create and file is not None and not file.exists():
        raise StudyError(missing)
    storage = open_storage(url)
    try:
        if create:
            return optuna.create_study(storage=storage, study_name=name, direction=DIRECTION, load_if_exists=True)
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError as exc:
        raise StudyError(missing) from exc
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as exc:
        raise StudyError(f"storage {url} must be readable and writable, got {reason(exc)}") from exc


@contextmanager
def run_lock(url: str, study_name: str) -> Iterator[None]:
    """Keep other processes from running the same study on the same file, for as long as the context lasts.

    The kernel frees the lock with the process, however that ends. Storages on a database server are made for many
    processes and have no lock.

    Raises:
        StudyLockedError: If another process holds it; the message names it.
    """
    file = local_file(url)
    if file is None:
        yield
        return
    path = file.with_name(f"{file.name}.{study_name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as exc:
        raise StudyError(f"{path}: lock must be writable, got {reason(exc)}; choose another storage_path") from exc
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise StudyLockedError(
                f"study {study_name!r} must be run by one process at a time on {file}, it is run by {holder};"
                " wait for it or stop it"
            ) from exc
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        handle.flush()
        yield


def claim(study: optuna.Study, trial_id: int) -> None:
    """Note in a running trial that this process runs it."""
    study._storage.set_trial_system_attr(trial_id, OWNER, asdict(Owner.me()))


def requeue(study: optuna.Study, trial: FrozenTrial) -> None:
    """Put a running trial back: the next ``ask`` continues it, with its parameters and what it reported."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def requeue_lost(study: optuna.Study, *, alone: bool = False) -> list[int]:
    """Put back the running trials whose process is gone.

    Args:
        study: The study.
        alone: Whether nobody else can be running trials. Then those without an owner are lost too: their process
            ended while it asked for them.

    Returns:
        Their numbers.
    """
    lost = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.system_attrs.get(OWNER)
        if alone if owner is None else Owner(**owner).is_gone:
            requeue(study, trial)
            lost.append(trial.number)
    return lost


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
    if name not in optuna.get_all_study_names(storage):
        return {}
    recorded: Mapping[str, Any] = optuna.load_study(storage=storage, study_name=name).user_attrs.get(FINGERPRINT, {})
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
        """Write one chunk's line and see it on disk.

        Raises:
            StudyError: If it cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc

    def begin(self, trial_number: int, digest: str, n_reported: int) -> list[str]:
        """Open the file of a trial for ``append``: keep the lines of the chunks that it reported, drop the rest.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe; lines made with another are dropped.
            n_reported: Chunks that the storage has a value of.

        Returns:
            The lines that were kept, at most ``n_reported``.

        Raises:
            StudyError: If the file cannot be written.
        """
        path = self.path(trial_number)
        kept: list[str] = []
        try:
            if n_reported and path.exists():
                # A torn last line may end within a character; it is dropped.
                first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
                kept = lines[:n_reported] if first == digest else []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in [digest, *kept]), encoding="utf-8")
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc
        return kept


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


def _cut_torn_line(file: Path, backend: JournalFileBackend) -> None:
    """Drop the end of a journal that a killed writer left without a newline: the next line would be glued to it."""
    if not _torn_line(file):
        return
    with get_lock_file(backend._lock):  # its writer may be at it
        torn = _torn_line(file)
        if torn and not torn.startswith(b"{"):
            raise ValueError(f"{torn[:40]!r} in its last line")
        os.truncate(file, file.stat().st_size - len(torn))


def _torn_line(file: Path) -> bytes:
    return file.read_bytes().rpartition(b"\n")[2]


def _write_ahead(engine: sqlalchemy.Engine) -> None:
    """SQLite's write-ahead log: readers do not wait, and a report costs 0.9 ms instead of 5.4."""

    def on_connect(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy.event.listen(engine, "connect", on_connect)
    engine.dispose()  # connections from before the listener


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started; None if there is none, 0 where the kernel does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self").exists() or not _answers(pid) else 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as exc:
        return isinstance(exc, PermissionError)
    return True


def reason(exc: BaseException) -> str:
    """The words of a storage's or the system's error, on one line."""
    cause = exc.__cause__ or exc
    cause = getattr(cause, "orig", None) or cause
    return " ".join(str(cause).split()) or type(cause).__name__


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
