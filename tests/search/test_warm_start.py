"""A search that begins where another one ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from optuna_merge.config.read import load_study
from optuna_merge.errors import ConfigError, StudyError, StudyMismatchError
from optuna_merge.search.space import SearchSpace
from optuna_merge.search.warm_start import WarmStart, find_warm_start, record_warm_start
from optuna_merge.storage import attributes
from optuna_merge.storage.open import local_file, open_storage, open_study
from optuna_merge.study.check import check_study
from optuna_merge.study.models import StudyModels
from optuna_merge.study.run import run_study
from optuna_merge.study.watcher import Watcher
from tests.study.test_objective import fake_objective

FIRST, SECOND = "layers_00_00.model_0.weight", "layers_00_00.model_1.weight"


def write_other(url: str, *trials: tuple[float, dict[str, float]], direction: str = "maximize") -> None:
    """A study with complete trials of these values and parameters."""
    file = local_file(url)
    assert file is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(storage=open_storage(url), study_name="other", direction=direction)
    for value, params in trials:
        distributions = {name: FloatDistribution(-9, 9) for name in params}
        study.add_trial(create_trial(value=value, params=params, distributions=distributions))


def opened(path: Path, **overrides: Any) -> tuple[Any, SearchSpace]:
    config = load_study(path, overrides)
    return config, SearchSpace(config, StudyModels.open(config).refs)


def test_the_mean_by_hand(study_file: Callable[..., Path], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    trials = [(0.4, {FIRST: 9.0}), (0.9, {FIRST: 0.2, SECOND: -1.0}), (0.7, {FIRST: 0.5, SECOND: -2.0}), (0.95, {})]
    write_other(url, *trials)
    given = {"study": "other", "storage": "sqlite:///other.db", "n_best": 2}
    config, space = opened(study_file(search={"warm_start": given}))
    # log(2.5) and log(2.5) - log(2), of their sum
    best, next_best = math.log(2.5), math.log(2.5 / 2)
    mean = (best * 0.2 + next_best * 0.5) / (best + next_best)
    found = find_warm_start(config, space)
    assert found == WarmStart("other", (1, 2), {FIRST: pytest.approx(mean), SECOND: 0.0})  # moved into its range
    assert found.describe(4) == "from the 2 best trials of study 'other', 2 of 4 weights"
    assert check_study(config).space["warm_start"] == found.describe(4)
    # of three, one lacks the second weight, which begins as it would have
    config, space = opened(config.path, **{"search.warm_start.n_best": 3})
    assert set(find_warm_start(config, space).params) == {FIRST}


def test_cma_es_begins_at_it(study_file: Callable[..., Path], tmp_path: Path) -> None:
    write_other(f"sqlite:///{tmp_path / 'other.db'}", (0.9, {FIRST: 0.7}))
    given = {"study": "other", "storage": "sqlite:///other.db"}
    objective = fake_objective(study_file(gold="0", search={"warm_start": given}))
    assert "search: starts from the 5 best trials of other" in objective.describe()
    study = optuna.create_study(direction="maximize", sampler=objective.sampler())
    objective.enqueue_baselines(study)
    study.optimize(objective, n_trials=7)
    uniform = max(study.trials[:3], key=lambda trial: trial.value).params
    assert study.user_attrs[attributes.START] == uniform | {FIRST: 0.7}
    assert study.user_attrs[attributes.START] != uniform


def test_it_is_kept_when_the_other_study_is_gone(study_file: Callable[..., Path], tmp_path: Path) -> None:
    """Stopped before the search's first draw, the other study deleted, it ends as one that ran through."""
    options = {"n_trials": 12, "seed": 3, "n_chunks": 5}
    other = study_file(gold="0", study={"name": "first", **options, "n_trials": 10}, storage_path="first")
    first = other.rename(tmp_path / "first.yaml")
    objective = fake_objective(first)
    run_study(objective.config, objective)

    class Stop(Watcher):
        def trial_started(self, trial: optuna.Trial) -> None:
            if trial.number == 2:
                raise KeyboardInterrupt

    params = []
    for folder in ("through", "stopped"):
        given = {"search": {"warm_start": {"file": "first.yaml", "n_best": 3}}, "storage_path": folder}
        file = study_file(gold="0", study={"name": "tiny", **options}, **given)
        objective = fake_objective(file)
        if folder == "stopped":
            assert run_study(objective.config, objective, Stop()).interrupted
            (tmp_path / "first" / "study.db").unlink()
            first.unlink()
        assert run_study(objective.config, objective).n_finished == 12
        trials = open_study(f"sqlite:///{tmp_path / folder / 'study.db'}", "tiny").trials
        params.append([trial.params for trial in trials])
        assert find_warm_start(objective.config, objective.space).study == "first"
    assert params[0] == params[1]
    # and another number of trials is another study
    data = yaml.safe_load(file.read_text())
    data["search"]["warm_start"]["n_best"] = 4
    file.write_text(yaml.safe_dump(data))
    objective = fake_objective(file)
    with pytest.raises(StudyMismatchError, match=r"search.warm_start=.*first.yaml.*\"n_best\": 3.* now it is .* 4"):
        run_study(objective.config, objective)


def test_studies_that_give_no_start(study_file: Callable[..., Path], tmp_path: Path) -> None:
    def refused(given: Any, message: str) -> None:
        config, space = opened(study_file(search={"warm_start": given}))
        for action in (lambda: find_warm_start(config, space), lambda: check_study(config)):
            with pytest.raises(StudyError, match=message) as caught:
                action()
            assert len(str(caught.value).splitlines()) == 1
        study = optuna.create_study()
        with pytest.raises(StudyError, match=message):
            record_warm_start(study, config, space)
        assert attributes.WARM_START not in study.user_attrs

    other = {"study": "other", "storage": "sqlite:///other.db"}
    url = f"sqlite:///{tmp_path / 'other.db'}"
    refused(other, r"study.yaml: search.warm_start: study 'other' must have been started, .* start it with run-study")
    write_other(url, (0.5, {}))
    refused(other, r"search.warm_start must be a study with a merge .*, study 'other' has none; run it first")
    refused({**other, "study": "another"}, r"search.warm_start: study 'another' must have been started")
    refused("study.yaml", r"search.warm_start must be another study, got 'tiny' itself")
    write_other(f"sqlite:///{tmp_path / 'names.db'}", (0.5, {"layers_00_03.math.weight": 1.0}))
    refused(
        {"study": "other", "storage": "sqlite:///names.db"},
        r"must be a study with parameters of this one, such as layers_00_00.model_0.weight, study 'other' has"
        r" layers_00_03.math.weight and the like; models' names, layer_granularity and filters must agree",
    )
    write_other(f"sqlite:///{tmp_path / 'down.db'}", (0.5, {FIRST: 1.0}), direction="minimize")
    refused({"study": "other", "storage": "sqlite:///down.db"}, r"maximises one value, study 'other' has minimize")


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ({"study": "other"}, {}, r"search.warm_start must be a study file, or \{study: NAME, storage: URL\}, got"),
        ({"file": "a.yaml", "study": "b"}, {}, r"search.warm_start must be a study file, or"),
        ({}, {}, r"search.warm_start must be a study file, or"),
        (7, {}, r"search.warm_start must be a mapping of keys, got 7"),
        ({"file": 7}, {}, r"search.warm_start.file must be a path, got 7"),
        ({"file": "a.yaml", "n_best": 0}, {}, r"search.warm_start.n_best must be at least 1, got 0"),
        ({"fil": "a.yaml"}, {}, r"search.warm_start.fil must be a known key, got 'fil'; did you mean 'file'"),
        ("a.yaml", {"study": {"sampler": "tpe"}}, r"search.warm_start must be absent for tpe, got 'a.yaml'; remove it"),
        ("a.yaml", {"random_init": True}, r"search.warm_start must be absent for random_init, got 'a.yaml'; remove"),
    ],
)
def test_what_a_study_file_may_not_say(
    study_file: Callable[..., Path], given: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(study_file(search={"warm_start": given}, **more))
