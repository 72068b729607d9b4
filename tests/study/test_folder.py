"""A folder belongs to one study, on the command line and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from optuna_merge.cli.options import open_started
from optuna_merge.errors import StudyError
from optuna_merge.storage import attributes
from optuna_merge.study.folder import BEST_CONFIG, OWNER_FILE, claim_folder
from optuna_merge.study.holdout import score_holdout
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import Outcome, run_study
from tests.processes import forked
from tests.study.test_objective import fake_objective

RANDOM = optuna.samplers.RandomSampler(seed=1)


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    return fake_objective(study_file(gold="0", study={"name": "tiny", "n_trials": 8, "seed": 3, "n_chunks": 5}))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a study that runs once more would change, but for its storage and its holdout."""
    files = [*(folder / "documents").rglob("*.jsonl"), folder / BEST_CONFIG, folder / OWNER_FILE]
    return {str(file): file.read_bytes() for file in files}


def in_file(tmp_path: Path, name: str = "mine", file: str = "mine.db") -> optuna.Study:
    return optuna.create_study(
        storage=f"sqlite:///{tmp_path / file}",
        study_name=name,
        direction="maximize",
        sampler=RANDOM,
        load_if_exists=True,
    )


def test_a_folder_is_one_study_s(objective: MergeObjective) -> None:
    run_study(objective.config, objective)
    folder = objective.config.storage_path
    own_id = open_started(objective.config).user_attrs[attributes.STUDY_ID]
    assert json.loads((folder / OWNER_FILE).read_text()) == {"study": "tiny", "id": own_id}
    before = contents(folder)
    assert run_study(objective.config, objective) == Outcome(8)
    options = objective.config.study.model_copy(update={"name": "tiny, too"})
    objective.config = objective.config.model_copy(update={"study": options})
    message = r"out: must be of study 'tiny, too', got that of study 'tiny'; choose another storage_path$"
    with pytest.raises(StudyError, match=message):
        run_study(objective.config, objective)
    with pytest.raises(StudyError, match=r"study 'tiny, too' must have been started"):
        open_started(objective.config)  # refused before it was created
    assert contents(folder) == before
    (folder / OWNER_FILE).write_text("{}")
    message = r"study.json: must name the study of its folder, got study: Field required; delete it"
    with pytest.raises(StudyError, match=message):
        run_study(objective.config, objective)


def test_a_study_in_python_does_not_overwrite_the_command_line_s(
    objective: MergeObjective, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    run_study(objective.config, objective)
    before = contents(objective.config.storage_path)
    message = (
        r"out: must be of study '.*', got that of study 'tiny'; choose another storage_path, such as"
        r' MergeObjective\.from_file\(path, {"storage_path": "another_study"}\)$'
    )
    for study in (in_file(tmp_path), optuna.create_study(direction="maximize", sampler=RANDOM)):
        with pytest.raises(StudyError, match=message):
            study.optimize(objective, n_trials=1)
        study.add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(StudyError, match=r"got that of study 'tiny'"):
            score_holdout(study, objective)
    assert contents(objective.config.storage_path) == before
    apart = fake_objective(objective.config.path, storage_path="another_study")
    study = in_file(tmp_path)
    study.optimize(apart, n_trials=2)
    study.optimize(apart, n_trials=1)
    assert apart.config.storage_path.name == "another_study"
    assert len([*apart.config.storage_path.glob("documents/*/*")]) == 3
    assert contents(objective.config.storage_path) == before


def test_a_study_of_the_same_name_in_another_storage_is_another_study(
    objective: MergeObjective, tmp_path: Path
) -> None:
    run_study(objective.config, objective)
    with pytest.raises(StudyError, match=r"must be of study 'tiny', got that of another study of that name; choose"):
        in_file(tmp_path, "tiny").optimize(objective, n_trials=1)
    url = f"sqlite:///{tmp_path / 'later.db'}"
    again = fake_objective(objective.config.path, **{"study.storage": url})
    with pytest.raises(StudyError, match=r"must be of study 'tiny', got that of another study of that name; choose"):
        run_study(again.config, again)
    # a copy of the study, such as one that moves to a database server, is the same study
    moved = f"sqlite:///{tmp_path / 'moved.db'}"
    optuna.copy_study(
        from_study_name="tiny",
        from_storage=f"sqlite:///{objective.config.storage_path}/study.db",
        to_storage=moved,
    )
    goes_on = fake_objective(objective.config.path, **{"study.storage": moved, "study.n_trials": 10})
    assert run_study(goes_on.config, goes_on) == Outcome(10)


def test_a_folder_without_an_id_goes_on_and_gets_one(objective: MergeObjective) -> None:
    run_study(objective.config, objective)
    folder, study = objective.config.storage_path, open_started(objective.config)
    (folder / OWNER_FILE).write_text('{"study": "tiny"}\n')
    claim_folder(study, folder)
    own_id = study.user_attrs[attributes.STUDY_ID]
    assert json.loads((folder / OWNER_FILE).read_text()) == {"study": "tiny", "id": own_id}
    with pytest.raises(StudyError, match=r"got that of study 'tiny'"):
        claim_folder(optuna.create_study(study_name="other"), folder)


def test_the_folder_of_a_study_in_memory_is_free_when_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def claim() -> None:
        claim_folder(optuna.create_study(study_name="gone"), folder)

    def claim_and_stay() -> None:
        claim()
        (tmp_path / "claimed").touch()
        while True:
            pass

    for _ in range(2):  # the second one in the place of the first
        with forked(claim) as [process]:
            process.join()
            assert process.exitcode == 0
    with forked(claim_and_stay):
        while not (tmp_path / "claimed").exists():
            pass
        with pytest.raises(StudyError, match=r"must be of study 'mine', got that of study 'gone'; choose another"):
            claim_folder(in_file(tmp_path), folder)
    for name in ("a", "b"):  # such as a cell of a notebook that is run again
        claim_folder(optuna.create_study(study_name=name), folder)
    claim_folder(in_file(tmp_path), folder)
    with pytest.raises(StudyError, match=r"must be of study 'c', got that of study 'mine'; choose another"):
        claim_folder(optuna.create_study(study_name="c"), folder)


def test_processes_that_begin_a_study_at_once_give_it_one_id(tmp_path: Path) -> None:
    in_file(tmp_path)

    def claim() -> None:
        for _ in range(5):
            claim_folder(in_file(tmp_path), tmp_path / "out")

    with forked(claim, claim, claim) as claimants:
        for process in claimants:
            process.join()
    assert [process.exitcode for process in claimants] == [0, 0, 0]
    own_id = in_file(tmp_path).user_attrs[attributes.STUDY_ID]
    assert json.loads((tmp_path / "out" / OWNER_FILE).read_text()) == {"study": "mine", "id": own_id}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"study.json.lock: lock must be writable, got .*; choose another storage_pa"):
        claim_folder(in_file(tmp_path), tmp_path / "file")
    (tmp_path / "out" / OWNER_FILE).mkdir(parents=True)
    with pytest.raises(StudyError, match=r"study.json: must name the study of its folder, got .*Is a dir.*; delete it"):
        claim_folder(in_file(tmp_path), tmp_path / "out")
