from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_merge.config.read import load_study
from optuna_merge.errors import CheckpointError, EngineError, NonFiniteMergeError, StudyError
from optuna_merge.merging.merger import Merger
from optuna_merge.search.pruner import paired_estimate
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import score_of
from optuna_merge.study.engines import build_scorer
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.replay import recorded_recipe
from optuna_merge.testing.engine import FakeEngine

OPTIMUM = {"weight_0": 1.2, "weight_1": 0.2}


def fake_objective(path: Path, **overrides: object) -> MergeObjective:
    """An objective whose score is best where model_0 has weight 1.2 and model_1 has 0.2 in every layer."""
    config = load_study(path, overrides)
    models = StudyModels.open(config)
    merger = Merger(models.checkpoints)
    space = SearchSpace(config, models.refs)
    params = {name: OPTIMUM["weight_0" if "model_0" in name else "weight_1"] for name in space.distributions}
    optimum = {name: tensor.clone() for name, tensor in merger.merge(space.decode(params))}
    engine = FakeEngine(optimum)
    return MergeObjective(config, models, LocalLoader(merger, engine), build_scorer(config, engine))


@pytest.fixture
def objective(study_file: Callable[..., Path]) -> MergeObjective:
    return fake_objective(study_file(gold="0"))


def test_a_plain_optuna_user_can_optimize_it(objective: MergeObjective) -> None:
    study = optuna.create_study(directions=objective.directions, sampler=objective.sampler(), pruner=objective.pruner())
    objective.enqueue_baselines(study)
    study.optimize(objective, n_trials=12)
    names = [trial.user_attrs.get(attributes.BASELINE) for trial in study.trials]
    assert names[:6] == ["uniform", "uniform x1.5", "uniform x2", "model_0", "model_1", "base"]
    assert names[6:] == [None] * 6
    first = study.trials[0]
    assert first.params == objective.space.uniform(1.0)
    assert study.trials[3].params == {}
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.trials)
    assert first.user_attrs["score one"] + first.user_attrs["score two"] == pytest.approx(2 * first.value)
    assert first.user_attrs["stderr one"] >= 0
    assert first.user_attrs[attributes.MERGE_SECONDS] > 0
    assert first.user_attrs[attributes.EVALUATION_SECONDS] > 0
    assert first.user_attrs[attributes.DOCUMENTS] == objective.scorer.n_documents == 60


def test_who_scores_a_trial_may_follow_its_chunks(objective: MergeObjective) -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    n_scored: list[int] = []
    trial = study.ask()
    value = objective.evaluate(trial, n_scored.append)
    assert n_scored == [1, 2, 3, 4, 5]
    assert value == objective.scorer.score_all().value
    objective(study.ask())
    assert n_scored == [1, 2, 3, 4, 5]  # only the call that passed it


def test_any_sampler_pruner_and_storage_will_do(objective: MergeObjective) -> None:
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner()
    )
    study.optimize(objective, n_trials=3)
    assert len(study.trials) == 3
    assert set(study.trials[0].params) == set(objective.space.distributions)


def test_the_value_is_the_weighted_sum_over_all_documents(objective: MergeObjective) -> None:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial(objective.space.uniform(1.0))
    study.optimize(objective, n_trials=1)
    trial = study.trials[0]
    objective.load(objective.recipe(trial))
    assert objective.scorer.score_all().value == trial.value
    assert list(trial.intermediate_values) == list(range(objective.scorer.n_chunks))


def test_a_merge_with_nan_fails_its_trial_and_the_study_goes_on(
    objective: MergeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = objective.loader.merger.merge

    def poisoned(recipe, out=None):
        for name, tensor in honest(recipe, out):
            yield name, tensor.fill_(math.nan) if "q_proj" in name else tensor

    study = optuna.create_study(direction="maximize")
    monkeypatch.setattr(objective.loader.merger, "merge", poisoned)
    study.optimize(objective, n_trials=1)
    monkeypatch.setattr(objective.loader.merger, "merge", honest)
    study.optimize(objective, n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert "q_proj" in study.trials[0].user_attrs[attributes.FAILURE]


def test_load_is_skipped_only_for_weights_that_are_loaded(objective: MergeObjective) -> None:
    recipe = objective.space.baseline_recipe("uniform")
    assert objective.load(recipe) > 0
    assert objective.load(recipe) == 0
    assert objective.load(objective.space.baseline_recipe("base")) > 0
    assert objective.loader.engine.n_loads == 2


def test_a_refused_load_is_not_taken_for_loaded(objective: MergeObjective, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = objective.space.baseline_recipe("uniform")

    def refuse(_: object) -> None:
        raise NonFiniteMergeError("x")

    with monkeypatch.context() as patch:
        patch.setattr(objective.loader.engine, "load_weights", refuse)
        with pytest.raises(NonFiniteMergeError):
            objective.load(recipe)
    assert objective.load(recipe) > 0


def test_pruned_trials_carry_the_paired_estimate(study_file: Callable[..., Path]) -> None:
    study_options = {"n_trials": 40, "seed": 1, "n_chunks": 15}
    path = study_file(gold="0", study=study_options, search={"start": "uniform"}, n_documents=80, holdout=None)
    objective = fake_objective(path)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=2))
    study.pruner = objective.pruner()
    study.optimize(objective, n_trials=30)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        estimate = trial.user_attrs["paired_estimate"]
        assert estimate < study.best_value
        assert trial.user_attrs[attributes.DOCUMENTS] < objective.scorer.n_documents
        objective.load(objective.recipe(trial))
        assert abs(objective.scorer.score_all().value - estimate) < 0.25
    assert study.best_trial.user_attrs[attributes.DOCUMENTS] == objective.scorer.n_documents


@pytest.mark.parametrize("pruner", ["wilcoxon", "none"])
def test_a_full_score_is_that_of_one_pass_whatever_the_pruner(study_file: Callable[..., Path], pruner: str) -> None:
    """The same merges are scored in ten chunks with a pruner, and in one pass."""
    study = {"seed": 1, "n_chunks": 10, "pruner": pruner}
    objective = fake_objective(study_file(gold="0", study=study, n_documents=70))
    sampler = optuna.samplers.RandomSampler(seed=2)
    chunked = optuna.create_study(direction="maximize", sampler=sampler, pruner=objective.pruner())
    chunked.optimize(objective, n_trials=25)
    at_once = fake_objective(study_file(gold="0", study={**study, "n_chunks": 1, "pruner": "none"}, n_documents=70))
    full = [trial for trial in chunked.trials if trial.state == TrialState.COMPLETE]
    assert len(full) == 25 if pruner == "none" else 0 < len(full) < 25
    for trial in full:
        at_once.load(at_once.space.decode(trial.params))
        assert at_once.scorer.score_all().value == trial.value
        assert trial.user_attrs[attributes.DOCUMENTS] == at_once.scorer.n_documents


def test_metrics_that_are_no_means_are_named_before_they_are_pruned_by(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = study_file(gold="0")
    task = tmp_path / "tasks" / "two.yaml"
    task.write_text(task.read_text().replace("aggregation: mean", "aggregation: median"))
    [said] = [line for line in fake_objective(path).describe() if "pruning" in line]
    assert said == "pruning compares two on the chunks scored so far: the metric is not a mean over documents"


def test_the_paired_estimate_by_hand() -> None:
    study = optuna.create_study(direction="maximize")
    distributions = {"x": optuna.distributions.FloatDistribution(0, 1)}
    best = optuna.trial.create_trial(
        value=0.6, params={"x": 0.5}, distributions=distributions, intermediate_values={0: 0.5, 1: 0.7, 2: 0.6}
    )
    study.add_trial(best)

    class Result:
        def __init__(self, score: float) -> None:
            self.score = score

    assert paired_estimate(study, [0.4, 0.5]) == pytest.approx(0.6 - (0.1 + 0.2) / 2)
    assert paired_estimate(study, []) is None
    assert paired_estimate(optuna.create_study(), [0.4]) is None


def test_baselines_are_enqueued_once(objective: MergeObjective) -> None:
    study = optuna.create_study(direction="maximize")
    objective.enqueue_baselines(study)
    objective.enqueue_baselines(study)
    assert len(study.trials) == len(objective.space.baselines) == 6


def test_a_trial_whose_recipe_has_changed_is_not_replayed(
    objective: MergeObjective, study_file: Callable[..., Path]
) -> None:
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=1)
    other = load_study(study_file(gold="0", search={"lambda": 0.5}))
    models = StudyModels.open(other)
    with pytest.raises(StudyError, match=r"trial 0: recipe must be the one that was scored .* restore them"):
        recorded_recipe(study.trials[0], SearchSpace(other, models.refs), models)


def test_a_waiting_trial_has_no_recipe(objective: MergeObjective) -> None:
    study = optuna.create_study(direction="maximize")
    objective.enqueue_baselines(study)
    with pytest.raises(StudyError, match=r"trial 0: must have been merged, it is waiting; see status"):
        objective.recipe(study.trials[0])


def test_the_fingerprint_does_not_depend_on_where_the_models_lie(
    objective: MergeObjective, study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_models)
    genome = {
        "models": ["moved/model_0", "moved/model_1"],
        "base_model": "moved/base",
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
    }
    assert fake_objective(study_file(gold="0", genome=genome)).fingerprint() == objective.fingerprint()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"limit": 20}, "limit"),
        ({"search": {"weight": [0.0, 1.0]}}, "search space"),
        ({"tasks": [{"name": "one", "weight": 0.3}, {"name": "two"}]}, "tasks"),
        ({"holdout": 0.5}, "prompts and documents"),
        ({"engine": {"dtype": "bfloat16"}}, "dtype"),
        ({"study": {"seed": 4, "n_chunks": 5}}, "study.seed"),
        ({"study": {"sampler": {"name": "cmaes", "popsize": 12}, "n_chunks": 5}}, "study.sampler.popsize"),
        ({"study": {"sampler": {"name": "cmaes", "sigma0": 0.1}, "n_chunks": 5}}, "study.sampler.sigma0"),
        ({"search": {"prior": {"common": 0.1}}}, "search.prior"),
        ({"search": {"prior": "isotropic"}}, "search.prior"),
        ({"search": {"weight": {"low": 0.0, "high": 1.5, "start": 0.4}}}, "search starts"),
        ({"random_init": True}, "random_init"),
    ],
)
def test_the_fingerprint_names_what_changes_a_score(
    objective: MergeObjective, study_file: Callable[..., Path], change: dict, key: str
) -> None:
    ours, theirs = objective.fingerprint(), fake_objective(study_file(gold="0", **change)).fingerprint()
    assert ours[key] != theirs[key]


def test_the_fingerprint_covers_the_models_content(
    objective: MergeObjective, study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path
) -> None:
    genome = load_study(study_file(gold="0")).genome.model_dump(mode="json")
    (tmp_path / "swapped").mkdir()
    shutil.copytree(tiny_models / "model_1", tmp_path / "swapped" / "model_0")
    genome["models"] = ["swapped/model_0", str(tiny_models / "model_1")]
    other = fake_objective(study_file(gold="0", genome=genome)).fingerprint()
    differing = {key for key, value in objective.fingerprint().items() if other[key] != value}
    assert differing == {"content of model_0"}


def test_missing_models_are_named(study_file: Callable[..., Path], tiny_models: Path) -> None:
    genome = {"models": ["./nowhere"], "base_model": str(tiny_models / "base"), "merge_method": "task_arithmetic"}
    with pytest.raises(CheckpointError, match=r"model './nowhere' must be an existing folder, found none at "):
        StudyModels.open(load_study(study_file(genome=genome)))


def test_auto_dtype_is_the_base_models(study_file: Callable[..., Path]) -> None:
    assert StudyModels.open(load_study(study_file(engine={"dtype": "auto"}))).refs.dtype == "float32"
    assert StudyModels.open(load_study(study_file(engine={"dtype": "bfloat16"}))).refs.dtype == "bfloat16"


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "maximize"]])
def test_a_study_that_does_not_maximise_is_refused(objective: MergeObjective, directions: list[str]) -> None:
    study = optuna.create_study(study_name="mine", directions=directions)
    message = rf"study 'mine': directions must be maximize, got {', '.join(directions)}; create it with"
    with pytest.raises(StudyError, match=message):
        objective(study.ask())


PARETO = {
    "tasks": [{"name": "one", "weight": 0.5, "objective": "a"}, {"name": "two", "weight": -0.25, "objective": "b"}],
    "study": {"name": "tiny", "n_chunks": 5, "goal": "pareto", "sampler": "random"},
}


def test_each_objective_is_the_weighted_sum_of_its_tasks(study_file: Callable[..., Path]) -> None:
    objective = fake_objective(study_file(gold="0", **PARETO))
    assert objective.directions == ["maximize", "maximize"]
    study = optuna.create_study(directions=objective.directions, sampler=objective.sampler())
    study.optimize(objective, n_trials=3)
    for trial in study.trials:
        attributes = trial.user_attrs
        assert trial.values == [0.5 * attributes["score one"], -0.25 * attributes["score two"]]
        assert score_of(trial) == pytest.approx(sum(trial.values))
        assert sorted(trial.intermediate_values) == [0, 1, 2, 3, 4]
    assert objective.fingerprint()["tasks"] == ["0.5 x one acc,none for a", "-0.25 x two acc,none for b"]


def test_a_merge_with_nan_fails_in_all_objectives(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = fake_objective(study_file(gold="0", **PARETO))

    def refuse(*_: object) -> None:
        raise NonFiniteMergeError("x")

    monkeypatch.setattr(objective.loader.engine, "load_weights", refuse)
    study = optuna.create_study(directions=objective.directions, sampler=objective.sampler())
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs[attributes.FAILURE] == "x"


def test_trials_in_threads_take_turns_with_the_model(objective: MergeObjective) -> None:
    sampler, pruner = optuna.samplers.RandomSampler(seed=1), optuna.pruners.NopPruner()
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=8, n_jobs=4)
    for trial in study.trials:
        objective.load(objective.recipe(trial))
        assert objective.scorer.score_all().value == trial.value


@pytest.mark.parametrize("again", ["models", "base_model"])
def test_one_model_by_two_names_is_refused(study_file: Callable[..., Path], tiny_models: Path, again: str) -> None:
    genome = {"models": [str(tiny_models / "model_0")], "base_model": str(tiny_models / "base")}
    other = "base" if again == "base_model" else "model_0"
    genome["models"].append(str(tiny_models / "model_1" / ".." / other))
    path = study_file(genome={**genome, "merge_method": "task_arithmetic"})
    with pytest.raises(CheckpointError, match=rf"must be different models, both are .*{other}; drop one or spell them"):
        StudyModels.open(load_study(path))


def test_scores_that_cannot_be_read_back(objective: MergeObjective) -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    value = objective(trial)
    file = objective.config.storage_path / "documents" / "tiny" / "trial_00000.jsonl"
    digest, _, *rest = file.read_text().splitlines()
    file.write_text("\n".join([digest, "{}", *rest, ""]))
    message = r"trial_00000.jsonl: scores must be readable, got .*; delete it: the trial is scored anew"
    with pytest.raises(StudyError, match=message):
        objective(trial)
    file.unlink()
    assert objective(trial) == value


@pytest.mark.parametrize("n_startup_steps", [5, 6])
def test_a_pruner_that_would_come_too_late_is_refused(study_file: Callable[..., Path], n_startup_steps: int) -> None:
    message = (
        rf"study\.yaml: study\.pruner\.n_startup_steps must be below the number of chunks, 5, got {n_startup_steps}"
    )
    with pytest.raises(StudyError, match=message):
        fake_objective(study_file(study={"n_chunks": 5, "pruner": {"n_startup_steps": n_startup_steps}})).pruner()
    fake_objective(study_file(study={"n_chunks": 5, "pruner": {"n_startup_steps": 4}})).pruner()


@pytest.mark.parametrize(("n_chunks", "pruner"), [(4, "wilcoxon"), (5, {"name": "wilcoxon", "p_threshold": 0.03})])
def test_too_few_chunks_to_prune_by_are_said(
    study_file: Callable[..., Path], n_chunks: int, pruner: str | dict
) -> None:
    def described(n_chunks: int) -> str:
        study = {"n_chunks": n_chunks, "pruner": pruner}
        return "\n".join(fake_objective(study_file(study=study, n_documents=70)).describe())

    never = f"pruning: never, the documents make {n_chunks} chunks and it takes more than "
    assert never in described(n_chunks)
    assert "pruning" not in described(n_chunks + 2)


def test_a_merge_device_that_is_not_there(study_file: Callable[..., Path]) -> None:
    config = load_study(study_file(), {"engine.merge_device": "cuda:99"})
    with pytest.raises(
        EngineError,
        match=r"engine.merge_device must be a device of this machine, got cuda:99 \(\d+ CUDA devices found\)",
    ):
        MergeObjective.from_config(config)
