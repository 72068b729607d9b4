"""``search.start: auto``: decided when a study is created, and kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optuna_merge.cli.options import open_started
from optuna_merge.config.read import load_study
from optuna_merge.errors import EngineError, StudyMismatchError
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import ascent_trial
from optuna_merge.study import start
from optuna_merge.study.check import check_study
from optuna_merge.study.engines import build_scorer, lacking_for_ascent, make_describing_engine, plan_ascent
from optuna_merge.study.memory import gib
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import as_started, run_study

STUDY = {"name": "tiny", "n_trials": 30, "seed": 3, "n_chunks": 2}
N_ENOUGH = 40  # documents of each of two tasks, of which three quarters are searched


def begin(file: Path, n_trials: int | None = None) -> MergeObjective:
    config = as_started(load_study(file, {"study.n_trials": n_trials} if n_trials else None))
    return MergeObjective.from_config(config)


def test_it_is_the_ascent_where_that_can_run_and_pays(study_file: Callable[..., Path]) -> None:
    objective = MergeObjective.from_file(study_file(n_documents=N_ENOUGH, study=STUDY))
    assert objective.config.search.start == "ascent"
    assert any(line.startswith("search: begins with an ascent") for line in objective.describe())
    assert check_study(load_study(objective.config.path)).space["ascent"].startswith("with an ascent")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_documents": N_ENOUGH - 4}, "an ascent needs 60 searched documents, here are 54"),
        ({"study": {**STUDY, "n_trials": 29}}, "an ascent pays from 30 trials on, here are 29"),
        ({"study": {**STUDY, "sampler": "tpe"}}, "an ascent must not be used with tpe"),
        ({"search": {"weight": 0.5}}, "an ascent must not be used with task_arithmetic"),
        ({"random_init": True}, "an ascent must not be used with random_init"),
    ],
)
def test_it_is_a_uniform_merge_elsewhere(study_file: Callable[..., Path], changes: dict[str, Any], reason: str) -> None:
    objective = MergeObjective.from_file(study_file(**{"n_documents": N_ENOUGH, "study": STUDY, **changes}))
    assert objective.config.search.start == "uniform"
    assert objective.describe()[-1] == f"search: begins at a uniform merge; {reason}"
    assert check_study(load_study(objective.config.path)).space["why_uniform"] == reason


def test_a_study_for_vllm_ascends_before_vllm_starts_if_the_card_suffices(study_file: Callable[..., Path]) -> None:
    file = study_file(n_documents=N_ENOUGH, study=STUDY, engine={"backend": "vllm", "dtype": "float32"})
    study = load_study(file)
    card = 2 * 2**30
    found = check_study(study, card)
    assert found.space["ascent"].endswith("weights of single tensors, by transformers before vLLM starts")
    assert 2**30 < found.memory["ascent"] < found.memory["device"] <= card
    assert f"; before that {gib(found.memory['ascent'])} for the ascent; " in found.memory_line
    # as much as a study of the transformers engine plans for it
    own = check_study(load_study(file, {"engine.backend": "hf", "study.n_chunks": found.n_chunks}), card)
    assert own.memory["gradient"] > 0
    assert found.memory["ascent"] == own.memory["device"] - own.memory["sources"]
    # auto does without it where it does not fit, and who insists is refused
    small = load_study(file, {"engine.vllm.kv_cache_memory_bytes": 2**20})
    tight = 2**30  # what the driver takes
    models = StudyModels.open(small)
    scorer = build_scorer(small, make_describing_engine(small, models))
    reason = lacking_for_ascent(small, models, scorer, tight)
    assert re.fullmatch(r"an ascent needs 1\.0\d GiB, the card has 1\.00 GiB", reason)
    with pytest.raises(EngineError, match=r"must fit into the card's .* or a step of the ascent"):
        plan_ascent(small, models, scorer, tight).check()
    shared = load_study(file, {"engine.vllm.tensor_parallel_size": 2})
    assert check_study(shared, card).space["why_uniform"] == "an ascent runs on one card, and vLLM takes 2 here"


def test_tasks_without_right_answers_have_no_gradient(study_file: Callable[..., Path], tmp_path: Path) -> None:
    file = study_file(n_documents=N_ENOUGH, study=STUDY)
    for name in ("one", "two"):
        path = tmp_path / "tasks" / f"{name}.yaml"
        path.write_text(path.read_text() + "\nprocess_results: !function broken.score\n")
    (tmp_path / "tasks" / "broken.py").write_text("def score(doc, results):\n    return {'acc': float('nan')}\n")
    objective = MergeObjective.from_file(file)
    assert objective.describe()[-1].endswith("no metric here has a gradient")


def test_a_study_keeps_how_it_began(study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = study_file(n_documents=16, study={**STUDY, "n_trials": 7})
    run_study((objective := begin(file)).config, objective)
    study = open_started(objective.config)
    assert ascent_trial(study.trials) is None
    monkeypatch.setattr(start, "LEAST_DOCUMENTS", 16)
    monkeypatch.setattr(start, "LEAST_TRIALS", 8)
    assert MergeObjective.from_file(file, {"study.n_trials": 8}).config.search.start == "ascent"
    # as does a study from before there were ascents
    new = ("search.start", "search.profile")
    fingerprint = {k: v for k, v in study.user_attrs[attributes.FINGERPRINT].items() if k not in new}
    study.set_user_attr(attributes.FINGERPRINT, fingerprint)
    run_study((objective := begin(file, 8)).config, objective)
    assert ascent_trial(study.trials) is None
    assert len(study.trials) == 8
    # unless the file asks for another start
    other = MergeObjective.from_file(file, {"study.n_trials": 9, "search.start": "ascent"})
    with pytest.raises(StudyMismatchError, match=r"created with search\.start=null, now it is \"ascent\""):
        run_study(other.config, other)
