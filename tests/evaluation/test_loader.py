"""Eval tasks that cannot be found, loaded or rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from tests.evaluation.task_files import N_DOCUMENTS, fake, loaded, write_task


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (EvalTask("letters", metric="f1"), "task 'letters' has no metric 'f1'; it has: acc,none, acc_norm,none"),
        (EvalTask("letters", metric="acc,strict"), "task 'letters' has no metric 'acc,strict'; it has: acc,none"),
        (EvalTask("telling"), "has no metric 'acc,none'; it has: exact_match,first, exact_match,whole"),
        (
            EvalTask("telling", metric="exact_match"),
            "has several filters for metric 'exact_match'; it has: exact_match,f",
        ),
        (EvalTask("early"), "task 'early' has no metric 'acc,none'; it has: is_early,none, spread,none"),
        (EvalTask("both", metric="acc_norm"), "task 'both' has no metric 'acc_norm'; it has: acc,none"),
    ],
)
def test_metrics_that_a_task_does_not_have(engine: HFEngine, tasks: Path, term: EvalTask, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        Scorer.build(engine, [term], task_search_path=[tasks])
    assert message in str(caught.value)


def test_an_unknown_task_lists_the_nearest_and_where_it_looked(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_local(*, include_path: Any, include_defaults: bool, metadata: Any) -> TaskManager:
        return TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)

    # lm-eval's own tasks take ten seconds to index
    monkeypatch.setattr("optuna_merge.evaluation.loader.TaskManager", only_local)
    with pytest.raises(TaskError) as caught:
        fake(tasks, terms=[EvalTask("lettres")])
    assert str(caught.value) == (
        f"unknown task 'lettres'; did you mean 'letters'? (looked in {tasks}, lm-eval's own tasks)"
    )
    (tmp_path / "torn.yaml").write_text("task: [")
    with pytest.raises(TaskError, match=r"torn\.yaml could not be read: "):
        fake(tmp_path, terms=[EvalTask("torn")])


KEYS = {"text": "doc_to_text", "docs": "process_docs", "results": "process_results"}


@pytest.mark.parametrize(
    ("which", "body", "message"),
    [
        (
            "text",
            "if args[0]['question'][0] == '3': raise KeyError('story')",
            "task 'broken', document 3: rendering its request raised KeyError: 'story'",
        ),
        (
            "text",
            "raise ValueError('no\\nstory')",
            "task 'broken', document 0: loading it raised ValueError: no; correct",
        ),
        (
            "results",
            "if args[0]['question'][0] == '3': raise KeyError('x')",
            "task 'broken', document 3: process_results raised KeyError: 'x'",
        ),
        (
            "results",
            "return {'acc': object()}",
            "task 'broken': metric 'acc' must be made of numbers and texts, got object",
        ),
        ("text", "import nothing_like_it", "loading it raised ModuleNotFoundError: No module"),
        ("docs", "return args[0].select([])", "task 'broken': no documents are left"),
    ],
)
def test_a_task_whose_code_raises_is_named_with_its_document(
    tmp_path: Path, which: str, body: str, message: str
) -> None:
    answer = {"text": "'q'", "results": "{'acc': 1}", "docs": "args[0]"}[which]
    (tmp_path / "broken_helpers.py").write_text(f"def f(*args):\n    {body}\n    return {answer}\n")
    write_task(tmp_path, "broken", n_documents=5, verbatim=f"{KEYS[which]}: !function broken_helpers.f\n")
    with pytest.raises(TaskError) as caught:
        _build_and_score(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _build_and_score(folder: Path) -> None:
    engine, scorer = fake(folder, terms=[EvalTask("broken")])
    loaded(engine, 0.1)
    scorer.score_all()


def test_a_task_that_runs_generated_code_must_be_allowed(tmp_path: Path) -> None:
    write_task(tmp_path, "broken", verbatim="unsafe_code: true\n")
    with pytest.raises(TaskError, match="task 'broken' runs code that the model generates"):
        _build_and_score(tmp_path)
    _, scorer = fake(tmp_path, terms=[EvalTask("broken")], allow_unsafe_code=True)
    assert scorer.n_documents == N_DOCUMENTS


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize(("split", "most"), [("test", N_DOCUMENTS - 1), ("train", N_DOCUMENTS)])
def test_more_examples_than_there_are_documents(tmp_path: Path, split: str, most: int, sampler: str) -> None:
    write_task(tmp_path, "one", fewshot_split=split, fewshot_config={"sampler": sampler})
    fake(tmp_path, terms=[EvalTask("one")], num_fewshot=most)
    with pytest.raises(TaskError, match=f"task 'one': num_fewshot must be at most {most}, .* got {most + 1}; lower it"):
        fake(tmp_path, terms=[EvalTask("one")], num_fewshot=most + 1)


def test_a_search_path_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task_search_path must name folders, got .*nowhere"):
        fake(tmp_path / "nowhere")


def test_a_task_must_have_a_filter(tmp_path: Path) -> None:
    write_task(tmp_path, "broken", filter_list=[])
    with pytest.raises(TaskError, match="task 'broken': filter_list must have a filter, got none"):
        fake(tmp_path, terms=[EvalTask("broken")])
