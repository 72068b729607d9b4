"""A contract for each of Optuna's internals that we use; a failure says what has changed and who depends on it."""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler, RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals import optuna as internals
from optuna_merge.storage.trials import generation
from optuna_merge.storage.wrapper import StorageWrapper

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {"a": FloatDistribution(-1, 1), "b": FloatDistribution(0, 10)}


def broken(what: str, users: str) -> str:
    return f"Optuna {optuna.__version__}: {what}; needed by {users}"


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(study_name="s")


def rdb(folder: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{folder}/study.db")


# --- studies and trials


def test_a_study_and_its_trials_have_a_storage_and_ids() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    users = "storage/claims.py, search/named.py, study/objective.py, report/dashboard.py"
    assert internals.storage_of(study) is storage, broken("Study._storage is not its storage", users)
    id_by_name = storage.get_study_id_from_name("s")
    assert internals.study_id(study) == id_by_name, broken("Study._study_id is not the storage's id", users)
    for one in (trial, study.trials[0]):
        id_by_number = storage.get_trial_id_from_study_id_trial_number(id_by_name, 0)
        assert internals.trial_id(one) == id_by_number, broken("_trial_id is not the storage's id", users)


def test_a_running_trial_knows_its_state_without_the_storage(study: optuna.Study) -> None:
    trial = study.ask()
    trial.suggest_float("a", 0, 1)
    trial.report(0.5, step=0)
    trial.set_user_attr("key", "value")
    known = internals.known_state(trial)
    users = "storage/claims.py (Claim.tell), study/objective.py, cli/progress.py, report/dashboard.py"
    assert isinstance(known, FrozenTrial), broken("Trial._cached_frozen_trial is no FrozenTrial", users)
    assert known.params == trial.params, broken("Trial._cached_frozen_trial lacks drawn parameters", users)
    assert known.intermediate_values == {0: 0.5}, broken("Trial._cached_frozen_trial lacks reported values", users)
    assert known.user_attrs == {"key": "value"}, broken("Trial._cached_frozen_trial lacks user attributes", users)
    known.intermediate_values[1] = 0.75
    assert internals.known_state(trial).intermediate_values[1] == 0.75, broken("the cached trial is a copy", users)


def test_known_trials_are_read_once_for_each_trial_and_can_be_set(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = "storage/claims.py (Claims.next), search/pruner.py, search/samplers.py, search/named.py"
    study.ask()
    known = internals.known_trials(study)
    assert [trial.number for trial in known] == [0], broken("Study._get_trials lacks a trial", users)
    storage = internals.storage_of(study)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "get_all_trials", None)
        assert internals.known_trials(study) is known, broken("Study._get_trials(use_cache=True) reads again", users)
        assert internals.known_trials(study, (TrialState.COMPLETE,)) == [], broken("states are not filtered", users)
        internals.set_known_trials(study, [])
        assert internals.known_trials(study) == [], broken("Study._thread_local.cached_all_trials is not used", users)
    internals.set_known_trials(study, None)
    assert len(internals.known_trials(study)) == 1, broken("cached_all_trials = None does not read again", users)
    study.tell(0, 1.0)
    study.ask()
    assert len(internals.known_trials(study)) == 2, broken("Study.ask does not forget the trials that it knew", users)


def test_hyperband_shows_a_sampler_one_bracket_of_a_study_that_is_behind_it() -> None:
    shown: list[optuna.Study] = []

    class Looks(RandomSampler):
        def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
            shown.append(study)

    pruner = optuna.pruners.HyperbandPruner(max_resource=9)
    study = optuna.create_study(sampler=Looks(), pruner=pruner)
    for _ in range(2):  # it decides on brackets after the first trial
        trial = study.ask()
        trial.report(1.0, step=1)
        trial.should_prune()
        study.tell(trial, 1.0)
    study.ask()
    users = "search/samplers.py and search/named.py, which learn from all brackets"
    assert shown[-1] is not study, broken("HyperbandPruner shows the whole study: whole_study can go", users)
    assert internals.whole_study(shown[-1]) is study, broken("_BracketStudy._study is not the study", users)
    assert internals.whole_study(study) is study, broken("Study has an attribute _study", users)


def test_an_enqueued_trial_has_fixed_parameters(study: optuna.Study) -> None:
    study.enqueue_trial({"a": 0.5})
    users = "search/samplers.py and search/named.py, which do not draw enqueued trials"
    enqueued, drawn = study.ask(), study.ask()
    what = "enqueue_trial keeps its parameters elsewhere than in the system attribute fixed_params"
    assert internals.has_fixed_params(internals.known_state(enqueued)), broken(what, users)
    assert not internals.has_fixed_params(internals.known_state(drawn)), broken("every trial has fixed_params", users)


# --- samplers


class Ours(internals.OpenCmaEsSampler):
    """Starts at a corner, and learns from all complete trials."""

    def make_optimizer(
        self,
        names: Any,
        bounds: np.ndarray,
        to_unit: Callable[[dict[str, Any]], np.ndarray],
        seed: int,
    ) -> Any:
        import cmaes

        self.made_with = (names, bounds.tolist(), to_unit({"a": 0.0, "b": 2.5}).tolist(), seed)
        return cmaes.CMA(mean=np.array([0.1, 0.9]), sigma=1e-9, bounds=bounds, seed=seed, population_size=4)

    def trials_to_learn_from(self, study: optuna.Study) -> list[FrozenTrial]:
        return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def suggest(trial: optuna.Trial) -> Mapping[str, float]:
    return {name: trial.suggest_float(name, one.low, one.high) for name, one in SPACE.items()}


def test_the_hooks_of_cma_es() -> None:
    users = "search/samplers.py (StableCmaEsSampler)"
    for name, parameters in {"_init_optimizer": ["trans", "direction"], "_get_trials": ["study"]}.items():
        hook = getattr(CmaEsSampler, name, None)
        assert hook is not None, broken(f"CmaEsSampler.{name} is gone", users)
        assert list(inspect.signature(hook).parameters)[1:] == parameters, broken(f"{name} takes others", users)
    sampler = Ours(seed=1, n_startup_trials=0, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    study.tell(study.ask(SPACE), 1.0)  # its search space is what the trials before have in common
    study.ask(SPACE)
    names, bounds, at, seed = sampler.made_with
    assert names == ["a", "b"], broken("_SearchSpaceTransform._search_space is not in the order of coordinates", users)
    assert bounds == [[0, 1], [0, 1]], broken("_SearchSpaceTransform.bounds is not [0, 1] for each", users)
    assert at == [0.5, 0.25], broken("_SearchSpaceTransform.transform does not map ranges to [0, 1]", users)
    assert 1 <= seed < 2**31, broken("the optimizer's seed is out of range", users)
    assert study.trials[1].params == pytest.approx({"a": -0.8, "b": 9.0}), broken("_init_optimizer is unused", users)


def test_a_draw_of_cma_es_follows_its_seed() -> None:
    def draw(seed: int) -> tuple[int, Mapping[str, float]]:
        sampler = Ours(seed=1, n_startup_trials=0, warn_independent_sampling=False)
        study = optuna.create_study(sampler=sampler)
        study.tell(study.ask(SPACE), 1.0)
        study.sampler = sampler = sampler.for_a_draw(seed)
        return sampler.made_with[3] if study.ask(SPACE).params else 0, study.trials[1].params

    users = "search/samplers.py (StableCmaEsSampler.sample_relative)"
    assert draw(7) == draw(7), broken("CmaEsSampler._cma_rng does not decide the draw", users)
    assert draw(7) != draw(8), broken("CmaEsSampler._cma_rng is not used", users)
    assert draw(7)[0] == np.random.RandomState(7).randint(1, 2**31 - 2), broken(
        "LazyRandomState is no numpy RandomState of its seed: studies draw other points than before", users
    )


def test_cma_es_records_the_generation_of_a_trial() -> None:
    study = optuna.create_study(sampler=Ours(seed=1, n_startup_trials=0, popsize=4))
    for _ in range(6):
        study.tell(study.ask(SPACE), 1.0)
    users = "storage/trials.py (generation), report/, cli/progress.py"
    found = [generation(trial) for trial in study.trials]
    assert found == [None, 0, 0, 0, 0, 1], broken("CmaEsSampler writes no system attribute cma:generation", users)


def test_a_seed_decides_what_a_sampler_draws() -> None:
    """Nothing private: but a draw that differs from those of earlier versions changes seeded studies."""
    study = optuna.create_study(sampler=RandomSampler(seed=7))
    drawn = study.ask().suggest_float("a", 0, 1)
    assert drawn == np.random.RandomState(7).uniform(0, 1), broken(
        "RandomSampler draws otherwise: seeded studies change", "search/samplers.py (StableRandomSampler)"
    )


# --- storages


def test_a_database_has_a_cache_in_front_and_a_journal_has_none(tmp_path: Path) -> None:
    users = "storage/batched.py, storage/writes.py, storage/lock.py"
    storage, journal = rdb(tmp_path), JournalStorage(JournalFileBackend(str(tmp_path / "log")))
    cached = internals.with_cache(storage)
    assert cached is not storage, broken("get_storage puts no cache in front of RDBStorage", users)
    assert internals.backend_of(cached) is storage, broken("_CachedStorage._backend is not the database", users)
    assert internals.with_cache(journal) is journal, broken("get_storage puts a cache in front of a journal", users)
    assert internals.backend_of(journal) is journal, broken("a journal's storage has another behind it", users)


def running(storage: BaseStorage) -> int:
    study = optuna.create_study(storage=storage, study_name="s")
    return internals.trial_id(study.ask())


def test_the_tables_of_a_database(tmp_path: Path) -> None:
    storage = rdb(tmp_path)
    trial_id = running(storage)
    storage.set_trial_param(trial_id, "a", 0.5, SPACE["a"])
    storage.set_trial_user_attr(trial_id, "key", [1])
    storage.set_trial_system_attr(trial_id, "key", [2])
    storage.set_trial_intermediate_value(trial_id, 3, 0.75)
    users = "storage/writes.py, which reads and writes these columns"
    expected: dict[str, dict[str, Any]] = {
        "trials": {"state": TrialState.RUNNING},
        "params": {"param_name": "a", "param_value": 0.5},
        "user_attrs": {"key": "key", "value_json": "[1]"},
        "system_attrs": {"key": "key", "value_json": "[2]"},
        "intermediate_values": {"step": 3, **internals.intermediate_value_columns(0.75)},
    }
    tables = internals.trial_tables()._asdict()
    with storage.engine.connect() as connection:
        for name, values in expected.items():
            row = connection.execute(sqlalchemy.select(tables[name])).mappings().one()
            assert row["trial_id"] == trial_id, broken(f"the table of {name} has no trial_id", users)
            assert {key: row[key] for key in values} == values, broken(f"the table of {name} has changed", users)
            if name == "params":
                distribution = optuna.distributions.json_to_distribution(row["distribution_json"])
                assert distribution == SPACE["a"], broken("distribution_json has changed", users)
        for name in ("params", "user_attrs", "system_attrs", "intermediate_values"):
            unique = [
                {column.name for column in constraint.columns}
                for constraint in tables[name].constraints
                if isinstance(constraint, sqlalchemy.UniqueConstraint)
            ]
            assert any("trial_id" in columns and len(columns) == 2 for columns in unique), broken(
                f"the table of {name} has no unique (trial_id, key): upserts would add rows twice", users
            )


@pytest.mark.parametrize("value", [0.5, math.inf, -math.inf, math.nan])
def test_the_columns_of_an_intermediate_value(tmp_path: Path, value: float) -> None:
    storage = rdb(tmp_path)
    trial_id = running(storage)
    table = internals.trial_tables().intermediate_values
    with storage.engine.begin() as connection:
        columns = internals.intermediate_value_columns(value)
        connection.execute(sqlalchemy.insert(table), {"trial_id": trial_id, "step": 0, **columns})
    read = storage.get_trial(trial_id).intermediate_values[0]
    assert read == pytest.approx(value, nan_ok=True), broken(
        "intermediate_value_to_stored_repr is not what is read back", "storage/writes.py"
    )


def test_the_lock_of_a_journal_file_is_a_link(tmp_path: Path) -> None:
    users = "storage/journal.py (MortalLock)"
    file, target = tmp_path / "journal", tmp_path / "journal.writer"
    target.touch()
    lock = internals.SymlinkLock(file, target)
    lock.acquire()
    assert lock.link.is_symlink(), broken("JournalFileSymlinkLock._lock_file is not the link", users)
    assert lock.link.readlink() == target, broken("JournalFileSymlinkLock._lock_target_file is not its target", users)
    assert lock.link == tmp_path / "journal.lock", broken("the link has another name: versions do not exclude", users)
    theirs = optuna.storages.journal.JournalFileSymlinkLock(str(file))
    assert vars(theirs)["_lock_file"] == os.fspath(lock.link), broken("Optuna's own lock is another file", users)
    lock.release()
    assert not lock.link.is_symlink(), broken("release leaves the link", users)


def test_a_wrapper_passes_on_every_call_that_a_storage_must_have() -> None:
    """Nothing private: but a call that Optuna adds and nobody passes on would be answered by its default."""
    abstract = {name for name in dir(BaseStorage) if getattr(getattr(BaseStorage, name), "__isabstractmethod__", False)}
    passed_on = {name for name in vars(StorageWrapper) if not name.startswith("_")}
    users = "storage/wrapper.py, and through it storage/batched.py and search/named.py"
    assert abstract <= passed_on, broken(f"storages must have {abstract - passed_on} too", users)
    for name in sorted(passed_on & vars(BaseStorage).keys()):
        theirs, ours = (inspect.signature(getattr(one, name)).parameters for one in (BaseStorage, StorageWrapper))
        assert list(ours) == list(theirs), broken(f"BaseStorage.{name} takes {list(theirs)}", users)


# --- the gRPC proxy


def test_a_server_answers_the_client_of_the_proxy() -> None:
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    users = "storage/proxy.py, storage/server.py"
    server = grpc.server(ThreadPoolExecutor())
    internals.add_storage_service(server, InMemoryStorage())
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            client = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port)
        client.wait_server_ready(timeout=60)
        assert running(client) == 0, broken("OptunaStorageProxyService does not answer its client", users)
        assert internals.address_of(client) == f"127.0.0.1:{port}", broken("GrpcStorageProxy._host, ._port", users)
        channel = internals.channel_of(client)
        assert isinstance(channel, grpc.Channel), broken("GrpcStorageProxy._channel is no grpc.Channel", users)
        client.close()
    finally:
        server.stop(grace=None).wait()


# --- one door


def test_no_other_file_touches_an_underscored_name_of_optuna() -> None:
    package = Path(internals.__file__).parents[1]
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        if path == Path(internals.__file__) or "optuna" not in text:
            continue
        tree = ast.parse(text)
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        theirs = [module for module in modules if module.split(".")[0] == "optuna"]
        found += [f"{path.name}: {module}" for module in theirs if "._" in module]
        if theirs:
            found += [
                f"{path.name}:{node.lineno}: {ast.unparse(node)}"
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and ast.unparse(node.value) not in ("self", "cls")
                and not ast.unparse(node.value).startswith("self._")  # an object of ours
            ]
    assert found == []


def test_the_internals_are_light() -> None:
    code = """
import sys
import optuna_merge.internals.optuna
print(*sorted({"torch", "grpc", "cmaes", "pandas", "optuna_dashboard"} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "\n"
