from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import JournalStorage, RDBStorage
from optuna.trial import TrialState

from optuna_merge.config.paths import absolute_storage
from optuna_merge.errors import StudyError, StudyMismatchError
from optuna_merge.storage import attributes
from optuna_merge.storage.fingerprint import check_fingerprint, recorded_fingerprint, refuse_differences
from optuna_merge.storage.lock import server_lock
from optuna_merge.storage.open import create_study, local_file, open_storage, open_study, storage_url
from optuna_merge.storage.runners import running
from optuna_merge.storage.trials import n_finished
from tests import databases
from tests.processes import forked, obeying_permissions

ROOT = Path(__file__).parents[2]
KINDS = ["sqlite:///", "journal://"]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def new_study(url: str = "sqlite://", name: str = "s") -> optuna.Study:
    return optuna.create_study(storage=open_storage(url), study_name=name)


# --- opening


def test_a_study_has_an_sqlite_file_of_its_own_unless_a_url_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_url(Path("out"), None) == f"sqlite:///{tmp_path}/out/study.db"
    assert storage_url(Path("out"), "") == f"sqlite:///{tmp_path}/out/study.db"
    assert storage_url(Path("out"), "postgresql://host/db") == "postgresql://host/db"


@pytest.mark.parametrize("name", ["which is better?", "50%25", "a#b", 'it\'s "quoted"', "🦊", "-dash"])
def test_the_file_of_a_study_lies_in_its_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    new_study(storage_url(tmp_path / name, None))
    new_study(absolute_storage("sqlite:///other.db", tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"study.db", "other.db"} <= {path.name for path in (tmp_path / name).iterdir()}


def test_a_storage_whose_name_is_too_long_for_a_file(tmp_path: Path) -> None:
    url = storage_url(tmp_path / ("x" * 300), None)
    for read in (open_study, recorded_fingerprint):
        with pytest.raises(
            StudyError, match=r"study\.db: storage must be readable, got .*too long.*; see storage_path"
        ):
            read(url, "s")


def test_a_storage_in_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    url = storage_url(tmp_path / "closed" / "study", None)
    (tmp_path / "closed").mkdir(mode=0o000)
    with obeying_permissions():
        for read in (open_study, recorded_fingerprint):
            with pytest.raises(StudyError, match=r"study\.db: storage must be readable, got .*denied.*; see storage_"):
                read(url, "s")


def test_the_file_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_file("sqlite:////a/b.db") == Path("/a/b.db")
    assert local_file("sqlite:///b.db") == tmp_path / "b.db"
    assert local_file("sqlite+pysqlite:///b.db") == tmp_path / "b.db"
    assert local_file("journal://b.log") == tmp_path / "b.log"
    assert local_file("journal:///a/b.log") == Path("/a/b.log")
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql://host/db", "mysql+pymysql://host/db"):
        assert local_file(url) is None


@pytest.mark.parametrize(("kind", "storage"), [("sqlite:///", RDBStorage), ("journal://", JournalStorage)])
def test_a_storage_is_created_with_its_folder_and_kept(tmp_path: Path, kind: str, storage: type) -> None:
    url = f"{kind}{tmp_path}/new/folder/study.db"
    assert isinstance(open_storage(url), storage)
    study = new_study(url)
    study.tell(study.ask(), 0.25)
    assert (tmp_path / "new/folder/study.db").is_file()
    assert optuna.load_study(storage=open_storage(url), study_name="s").best_value == 0.25


def test_sqlite_writes_ahead_so_that_readers_do_not_wait(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = new_study(url)
    storage = open_storage(url)
    assert isinstance(storage, RDBStorage)
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # NORMAL
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", timeout=0)) as writer:
        writer.execute("BEGIN IMMEDIATE")  # a writer in the middle of its transaction
        assert optuna.load_study(storage=storage, study_name="s").study_name == study.study_name
        writer.rollback()


@pytest.mark.parametrize("kind", KINDS)
def test_a_storage_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StudyError, match=r"/folder must be readable and writable, got .*; see storage_path$") as caught:
        open_storage(f"{kind}{tmp_path}/folder")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StudyError, match=r"must be readable and writable, got .*(File exists|Not a directory)"):
        open_storage(f"{kind}{tmp_path}/file/study.db")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_may_not_be_written(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o500)
    with obeying_permissions(), pytest.raises(StudyError, match=r"lock must be writable, got .*; choose another"):
        open_storage(f"{kind}{tmp_path}/study.db")


@pytest.mark.parametrize(
    ("kind", "content", "got"),
    [
        ("sqlite:///", b"SQLite? No, a poem.\n" * 300, "file is not a database"),
        ("journal://", b"no journal\nat all\n", "Expecting value"),
        ("journal://", b'{"json": "but no journal"}\n', "op_code"),
        ("journal://", b"[1]\n", "list"),
        ("journal://", b"a line without an end", "a line without an end"),
    ],
)
def test_a_file_that_is_no_storage(tmp_path: Path, kind: str, content: bytes, got: str) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(StudyError, match=rf"study.db must be .*, got .*{got}") as caught:
        open_storage(f"{kind}{tmp_path}/study.db")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "study.db").read_bytes() == content


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", r"storage study.db must be readable and writable, got .*parse"),
        ("sqlite:study.db", r"storage must be a URL such as sqlite:///study.db, got sqlite:study.db;"),
        ("nosuchdb://host/db", r"storage nosuchdb://host/db must be readable and writable, got .*nosuchdb"),
        (
            "oracle+nodriver://host/db",
            r"storage oracle\+nodriver://host/db must be readable and writable, got .*nodriver",
        ),
    ],
)
def test_urls_that_lead_nowhere(url: str, message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value)


def test_who_opens_a_database_that_has_its_tables_waits_for_nobody() -> None:
    with databases.postgres() as server:
        open_storage(server.url)
        engine = sqlalchemy.create_engine(server.url.replace("postgresql:", "postgresql+psycopg:"))
        with server_lock(engine, "\0schema"), forked(lambda: open_storage(server.url)) as [process]:  # as from far away
            process.join(120)
            assert process.exitcode == 0
        engine.dispose()


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(StudyError, match=r"postgresql://host/db must be a storage that Optuna can open, got .*psycopg"):
        open_storage("postgresql://host/db")


def test_a_journal_s_torn_last_line_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "study.log"
    url = f"journal://{file}"
    study = new_study(url)
    study.tell(study.ask(), 1.0)
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"op_code": 4, "wor')  # killed while it wrote
    study = optuna.load_study(storage=open_storage(url), study_name="s")
    assert file.read_bytes() == whole
    for value in (2.0, 3.0):
        study.tell(study.ask(), value)
    again = optuna.load_study(storage=open_storage(url), study_name="s")
    assert [trial.value for trial in again.trials] == [1.0, 2.0, 3.0]
    file.write_bytes(b"{torn")
    assert open_storage(url).get_all_studies() == []


# --- trials


def test_finished_trials_are_those_that_have_ended() -> None:
    study = optuna.create_study()
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    study.enqueue_trial({"x": 1.0})
    assert len(study.trials) == 5
    assert n_finished(study) == 3


def test_attribute_keys_are_distinct() -> None:
    keys = [value for name, value in vars(attributes).items() if name.isupper()]
    assert len(keys) >= 17
    assert len(set(keys)) == len(keys)


# --- fingerprint


def test_the_fingerprint_is_recorded_and_compared() -> None:
    study = optuna.create_study(study_name="ties_7b")
    made = {"layer_granularity": 4, "models": ("a", "b"), "seed": 0, "tasks": [{"name": "x"}]}
    check_fingerprint(study, made)
    study.ask()
    check_fingerprint(study, made)  # tuples and lists are one in JSON
    check_fingerprint(study, {**made, "models": ["a", "b"]})
    with pytest.raises(StudyMismatchError) as caught:
        check_fingerprint(study, {**made, "layer_granularity": 8, "models": ["b", "a"]})
    assert str(caught.value).splitlines() == [
        "study 'ties_7b' was created with layer_granularity=4, now it is 8; use a new study name or restore 4",
        'study \'ties_7b\' was created with models=["a", "b"], now it is ["b", "a"];'
        ' use a new study name or restore ["a", "b"]',
    ]
    assert study.user_attrs[attributes.FINGERPRINT] == json.loads(json.dumps(made))


def test_a_digest_is_named_only_if_nothing_that_it_is_made_of_is() -> None:
    study = optuna.create_study(study_name="s")
    made = {"limit": 10, attributes.REQUESTS: "abc"}
    check_fingerprint(study, made)
    with pytest.raises(StudyMismatchError, match=r'with prompts and documents="abc", now it is "def"; use'):
        check_fingerprint(study, {**made, attributes.REQUESTS: "def"})
    with pytest.raises(StudyMismatchError) as caught:
        check_fingerprint(study, {"limit": 20, attributes.REQUESTS: "def"})
    assert str(caught.value) == (
        "study 's' was created with limit=10, now it is 20; use a new study name or restore 10"
    )


def test_a_value_of_which_the_study_knew_nothing_is_a_difference() -> None:
    study = optuna.create_study(study_name="s")
    check_fingerprint(study, {"a": 1})
    with pytest.raises(StudyMismatchError, match=r"created with new=null, now it is 3; use a new"):
        check_fingerprint(study, {"a": 1, "new": 3})


def test_a_long_value_is_shortened() -> None:
    study = optuna.create_study(study_name="s")
    check_fingerprint(study, {"tasks": "a" * 500})
    with pytest.raises(StudyMismatchError, match=rf'tasks="{"a" * 116}\.\.\., now it is "b";'):
        check_fingerprint(study, {"tasks": "b"})


def test_a_study_of_something_else_is_refused() -> None:
    study = optuna.create_study(study_name="s")
    study.tell(study.ask(), 1.0)
    with pytest.raises(
        StudyMismatchError,
        match=r"study 's' must be made by optuna-merge, its storage holds trials of something else;"
        r" use a new study name or storage_path",
    ):
        check_fingerprint(study, {"a": 1})
    assert attributes.FINGERPRINT not in study.user_attrs


def test_a_password_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StudyError, match=r"postgresql://me:\*\*\*@host/db must be") as caught:
        open_storage("postgresql://me:secret@host/db")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_many_processes_may_create_one_storage(tmp_path: Path, kind: str) -> None:
    url = f"{kind}{tmp_path}/study.db"
    with forked(*[lambda: create_study(url, "mine")[0].ask()] * 6) as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert [trial.number for trial in open_study(url, "mine").trials] == list(range(6))


def test_who_runs_a_study_of_a_file_knows_whether_it_is_alone(tmp_path: Path) -> None:
    url, alone = f"sqlite:///{tmp_path}/out/study.db", []
    with running(url, "mine", alone.append):
        with running(url, "mine", alone.append), running(url, "another", alone.append):
            pass
        with running(url.replace("study.db", "other.db"), "mine", alone.append):
            pass
    with running(url, "mine", alone.append):
        pass
    with running("postgresql://host/db", "mine", alone.append):
        pass
    assert alone == [True, False, True, True, True, False]


def test_a_storage_that_dies_with_the_process_is_refused() -> None:
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(StudyError, match=r"storage must outlive the process, got sqlite:.*; name a file"):
            create_study(url, "mine")


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorded_fingerprint(tmp_path: Path, kind: str) -> None:
    url = f"{kind}{tmp_path}/study.db"
    assert recorded_fingerprint(url, "mine") == {}
    assert not (tmp_path / "study.db").exists()
    check_fingerprint(create_study(url, "mine")[0], {"limit": 3})
    assert recorded_fingerprint(url, "mine") == {"limit": 3}
    assert recorded_fingerprint(url, "yours") == {}


def test_a_part_of_a_fingerprint_is_compared_alone() -> None:
    study = optuna.create_study(study_name="mine")
    refuse_differences(study, {"limit": 4})
    check_fingerprint(study, {"limit": 3, "seed": 1})
    refuse_differences(study, {"seed": 1})
    with pytest.raises(StudyMismatchError, match=r"created with limit=3, now it is 4"):
        refuse_differences(study, {"limit": 4})
