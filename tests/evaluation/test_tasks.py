from __future__ import annotations

import json
import logging
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.results import ChunkResult, Score
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from optuna_merge.testing.engine import FakeEngine
from optuna_merge.testing.models import write_tiny_models

N_DOCUMENTS = 24
WORDS = ["cat", "dog", "mat", "sat", "one", "two", "three", "four", "letter", "next"]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MEAN = {"aggregation": "mean", "higher_is_better": True}


def write_task(folder: Path, name: str, n_documents: int = N_DOCUMENTS, verbatim: str = "", **settings: Any) -> None:
    rnd = random.Random(name)
    rows = []
    for number in range(n_documents):
        choices = [" ".join(rnd.sample(WORDS, rnd.randint(1, 3))) for _ in range(4)]
        question = f"{number} {' '.join(rnd.sample(WORDS, 3))}"
        rows.append({"question": question, "choices": choices, "gold": rnd.randrange(4), "text": "the " + question})
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        **settings,
    }
    written = {key: value for key, value in task.items() if value is not None and f"{key}:" not in verbatim}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(written) + verbatim)


HELPERS = """
def process(doc, results):
    scores = [r[0] for r in results]
    return {"is_early": float(scores.index(max(scores)) < 2), "spread": (max(scores), min(scores))}

def widest(values):
    return max(high - low for high, low in values)
"""

EARLY = """
process_results: !function helpers.process
metric_list:
- {metric: is_early, aggregation: mean, higher_is_better: true}
- {metric: spread, aggregation: !function helpers.widest, higher_is_better: true}
"""


def write_all(folder: Path) -> Path:
    folder.mkdir()
    (folder / "helpers.py").write_text(HELPERS)
    write_task(folder, "letters", doc_to_choice=["A", "B", "C", "D"], tag=["choosing"])
    write_task(folder, "phrases", n_documents=30, tag=["choosing"])
    write_task(folder, "shots", fewshot_split="train", num_fewshot=1, doc_to_choice=["A", "B", "C", "D"])
    write_task(folder, "early", verbatim=EARLY)
    write_task(
        folder,
        "cloze",
        output_type="loglikelihood",
        doc_to_target=" {{choices[0]}}",
        doc_to_choice=None,
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", **MEAN}],
    )
    write_task(
        folder,
        "prose",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        doc_to_choice=None,
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        folder,
        "telling",
        n_documents=10,
        output_type="generate_until",
        doc_to_target="t",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        filter_list=[
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
        metric_list=[{"metric": "exact_match", **MEAN}],
    )
    for name, by_size in (("both", True), ("each", False)):
        group = {
            "group": name,
            "task": ["letters", "phrases"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval") / "tasks")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, [folder] = write_tiny_models(tmp_path_factory.mktemp("models"), 1, spread=0.4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def engine(model: Path) -> HFEngine:
    engine = HFEngine(model, device="cpu")
    engine.load_weights(load_file(model / "model.safetensors").items())
    return engine


@pytest.fixture(scope="module")
def peer(model: Path, tasks: Path) -> Callable[..., dict[str, Any]]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)

    def evaluate(names: list[str], **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, **options)  # type: ignore[no-any-return]

    return evaluate


CASES = [
    ("letters", "acc,none"),
    ("letters", "acc_norm,none"),
    ("phrases", "acc,none"),
    ("phrases", "acc_norm"),
    ("shots", "acc"),
    ("cloze", "perplexity,none"),
    ("cloze", "acc"),
    ("prose", "word_perplexity"),
    ("prose", "bits_per_byte,none"),
    ("telling", "exact_match,first"),
    ("telling", "exact_match,whole"),
    ("early", "is_early"),
    ("early", "spread"),
    ("both", "acc,none"),
    ("each", "acc"),
]


@pytest.fixture(scope="module")
def expected(peer: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    options = {"limit": 20, "bootstrap_iters": 100, "apply_chat_template": False}
    results = {}
    for names in (["letters", "phrases", "shots", "prose", "telling", "early", "cloze"], ["both"], ["each"]):
        results |= peer(names, **options)["results"]
    return results


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_a_full_score_is_the_figure_of_lm_eval(
    engine: HFEngine, tasks: Path, expected: dict[str, Any], n_chunks: int
) -> None:
    terms = [EvalTask(name, 0.5, metric) for name, metric in CASES]
    scorer = Scorer.build(
        engine, terms, task_search_path=[tasks], limit=20, apply_chat_template=False, n_chunks=n_chunks
    )
    score = scorer.score_all()
    names = [name for name, _ in CASES]
    for name, metric in CASES:
        key = name if names.count(name) == 1 else f"{name} ({metric})"
        full = metric if "," in metric else f"{metric},none"
        assert score.tasks[key].metric == full
        assert score.tasks[key].value == pytest.approx(expected[name][full], rel=1e-5, abs=1e-12), key
        stderr = expected[name].get(full.replace(",", "_stderr,"))
        if scorer.describe().tasks[list(score.tasks).index(key)].is_mean:
            assert score.tasks[key].stderr == pytest.approx(stderr), key
    assert score.value == pytest.approx(sum(0.5 * task.value for task in score.tasks.values()))
    not_means = ("cloze (perplexity,none)", "prose (word_perplexity)", "prose (bits_per_byte,none)", "early (spread)")
    assert scorer.not_means == not_means
    assert score.tasks["both"].n_documents == 40


def test_few_shot_and_chat_templates_as_lm_eval_renders_them(
    engine: HFEngine, tasks: Path, peer: Callable[..., dict[str, Any]]
) -> None:
    terms = [EvalTask("shots"), EvalTask("letters"), EvalTask("telling", metric="exact_match,whole")]
    for multiturn in (False, True):
        options: dict[str, Any] = {"limit": 0.5, "num_fewshot": 2, "fewshot_as_multiturn": multiturn}
        scorer = Scorer.build(engine, terms, task_search_path=[tasks], **options)
        names = [term.name for term in terms]
        results = peer(names, apply_chat_template=True, bootstrap_iters=0, **options)
        prompts = {name: [s["arguments"] for s in results["samples"][name] if s["filter"] != "first"] for name in names}
        for leaf in (term.leaves[0] for term in scorer._terms):
            rendered = [[i.args for i in leaf.instances[doc_id]] for doc_id in leaf.selected]
            assert rendered == prompts[leaf.name]
        assert scorer.describe().chat_template_reason == "applied: the tokenizer has one"
        score = scorer.score_all()
        for term in terms:
            full = "exact_match,whole" if term.name == "telling" else "acc,none"
            assert score.tasks[term.name].value == results["results"][term.name][full]


def fake(tasks: Path, **options: Any) -> tuple[FakeEngine, Scorer]:
    engine = FakeEngine({"w": torch.zeros(4)})
    terms = options.pop("terms", [EvalTask("right"), EvalTask("rarely", -2.0)])
    return engine, Scorer.build(engine, terms, task_search_path=[tasks], **options)


def loaded(engine: FakeEngine, distance: float) -> None:
    engine.load_weights([("w", torch.full((4,), distance))])


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    write_task(folder, "right", n_documents=200, doc_to_choice=["right", "wrong"], doc_to_target=0)
    write_task(folder, "rarely", n_documents=100, doc_to_choice=["right", "wrong", "bad"], doc_to_target=0)
    return folder


def test_chunks_are_fixed_stratified_and_complete(right: Path) -> None:
    engine, scorer = fake(right, n_chunks=10, seed=3)
    _, again = fake(right, n_chunks=10, seed=3)
    _, other = fake(right, n_chunks=10, seed=4)
    loaded(engine, 0.5)
    results = [scorer.score_chunk(chunk) for chunk in range(10)]
    ids = [result.documents["right"]["doc_id"] for result in results]
    assert sorted(doc_id for some in ids for doc_id in some) == list(range(200))
    assert {len(i) for i in ids} == {20}
    assert {len(result.documents["rarely"]["doc_id"]) for result in results} == {10}
    assert ids[0] != list(range(20))
    assert again.fingerprint() == scorer.fingerprint() != other.fingerprint()
    total = scorer.total(results[::-1])
    assert total == scorer.total(results) == scorer.score_all()
    assert total.documents["right"]["doc_id"] == list(range(200))
    assert total.value == total.tasks["right"].value - 2 * total.tasks["rarely"].value
    # equal strata: the chunks' mean is the total
    assert statistics.mean(result.score for result in results) == pytest.approx(total.value)


def test_results_and_scores_go_through_json_unchanged(engine: HFEngine, tasks: Path) -> None:
    terms = [EvalTask("early", metric="spread"), EvalTask("prose", metric="bits_per_byte"), EvalTask("letters")]
    scorer = Scorer.build(engine, terms, task_search_path=[tasks], n_chunks=3)
    results = [scorer.score_chunk(chunk) for chunk in range(3)]
    read = [ChunkResult.from_json(result.to_json()) for result in results]
    assert read == results
    score = scorer.total(results)
    assert scorer.total(read) == score
    assert Score.from_json(score.to_json()) == score
    with pytest.raises(TaskError, match="chunk result: not readable"):
        ChunkResult.from_json("{}")
    with pytest.raises(TaskError, match="score: not readable"):
        Score.from_json("[]")
    with pytest.raises(TaskError, match="must hold each chunk once"):
        scorer.total([results[0], results[0]])


def test_a_trial_leaves_nothing_for_the_next_one(right: Path) -> None:
    engine, scorer = fake(right, n_chunks=2)
    values = []
    for distance in (0.2, 1.0, 0.2):
        loaded(engine, distance)
        values.append(scorer.score_all())
    assert values[0] == values[2] != values[1]


def test_the_holdout_is_a_fixed_share_that_is_never_searched(right: Path) -> None:
    engine, scorer = fake(right, holdout=0.3, seed=1)
    loaded(engine, 0.4)
    searched, held = scorer.score_all().documents, scorer.score_holdout().documents
    for name, n in (("right", 200), ("rarely", 100)):
        assert len(held[name]["doc_id"]) == 0.3 * n
        assert sorted(searched[name]["doc_id"] + held[name]["doc_id"]) == list(range(n))
    assert [(t.n_searched, t.n_holdout) for t in scorer.describe().tasks] == [(140, 60), (70, 30)]
    assert fake(right, holdout=0.3, seed=1)[1].fingerprint() == scorer.fingerprint()
    assert fake(right, holdout=0.3, seed=2)[1].fingerprint() != scorer.fingerprint()
    assert fake(right, seed=1)[1].fingerprint() != scorer.fingerprint()


def test_other_tasks_can_be_the_holdout(right: Path) -> None:
    engine, scorer = fake(right, terms=[EvalTask("right")], holdout=[EvalTask("rarely")], limit=50)
    loaded(engine, 0.4)
    assert list(scorer.score_all().tasks) == ["right"]
    score = scorer.score_holdout()
    assert list(score.tasks) == ["rarely"]
    assert score.tasks["rarely"].n_documents == 50
    assert [(t.name, t.n_searched, t.n_holdout) for t in scorer.describe().tasks] == [
        ("right", 50, 0),
        ("rarely", 0, 50),
    ]
    with pytest.raises(TaskError, match="holdout: task 'right' is also searched"):
        fake(right, terms=[EvalTask("right")], holdout=[EvalTask("right")])


def test_without_a_holdout_there_is_nothing_to_score(right: Path) -> None:
    _, scorer = fake(right)
    assert not scorer.has_holdout
    with pytest.raises(TaskError, match="there are no holdout documents"):
        scorer.score_holdout()


def test_a_paired_difference_by_hand(right: Path) -> None:
    engine, scorer = fake(right, n_chunks=1)
    loaded(engine, 0.3)
    first = scorer.score_all()
    loaded(engine, 0.9)
    second = scorer.score_all()
    difference, error = scorer.paired_difference(first, second)
    assert difference == first.value - second.value
    variance = 0.0
    for name, weight, n in (("right", 1, 200), ("rarely", -2, 100)):
        values = [np.array(s.documents[name]["acc,none"]) for s in (first, second)]
        variance += weight**2 * np.var(values[0] - values[1], ddof=1) / n
    assert error == pytest.approx(math.sqrt(variance))
    assert scorer.paired_difference(first, first) == (0, 0)
    _, smaller = fake(right, limit=50)
    with pytest.raises(TaskError, match="must be over the same documents"):
        scorer.paired_difference(first, smaller._engine.load_weights([("w", torch.zeros(4))]) or smaller.score_all())


def test_a_paired_difference_of_a_metric_that_is_no_mean(engine: HFEngine, model: Path, tasks: Path) -> None:
    terms = [EvalTask("prose", metric="bits_per_byte"), EvalTask("both")]
    scorer = Scorer.build(engine, terms, task_search_path=[tasks], apply_chat_template=False)
    weights = load_file(model / "model.safetensors")
    first = scorer.score_all()
    engine.load_weights((name, tensor * 0.95) for name, tensor in weights.items())
    second = scorer.score_all()
    engine.load_weights(weights.items())
    difference, error = scorer.paired_difference(first, second)
    assert difference != 0
    assert 0 < error < abs(first.value)
    assert scorer.paired_difference(first, second) == (difference, error)


def test_shuffling_draws_other_documents_with_the_prompts_of_a_full_run(engine: HFEngine, tasks: Path) -> None:
    def prompts(**options: Any) -> dict[int, Any]:
        scorer = Scorer.build(engine, [EvalTask("shots")], task_search_path=[tasks], num_fewshot=2, **options)
        leaf = scorer._terms[0].leaves[0]
        return {doc_id: [i.args for i in leaf.instances[doc_id]] for doc_id in leaf.searched}

    full = prompts()
    drawn = prompts(shuffle=True, limit=8, seed=5)
    assert len(drawn) == 8
    assert list(drawn) != list(range(8))
    assert list(drawn) == list(prompts(shuffle=True, limit=8, seed=5))
    assert all(full[doc_id] == prompt for doc_id, prompt in drawn.items())


def test_the_number_of_chunks(right: Path) -> None:
    assert fake(right)[1].n_chunks == 50
    assert fake(right, limit=20)[1].n_chunks == 12  # 100 requests, 8 a chunk
    assert fake(right, limit=3)[1].n_chunks == 1
    assert fake(right, n_chunks=100)[1].n_chunks == 100
    with pytest.raises(TaskError, match=r"n_chunks must be between 1 and 100 .*, got 101"):
        fake(right, n_chunks=101)


def test_chunks_that_would_cost_too_much_are_not_made(tiny_models: Path, tasks: Path) -> None:
    engine = HFEngine(tiny_models / "base", device="meta", batch_tokens=128)
    options: dict[str, Any] = {"task_search_path": [tasks], "apply_chat_template": False}
    terms = [EvalTask("letters"), EvalTask("phrases")]

    def cost(n_chunks: int | None) -> tuple[int, float]:
        scorer = Scorer.build(engine, terms, n_chunks=n_chunks, min_chunk_requests=1, **options)
        return scorer.n_chunks, sum(chunk.prepared.cost for chunk in scorer._chunks)

    _, at_once = cost(1)
    chosen, chosen_cost = cost(None)
    assert chosen > 1
    assert chosen_cost <= 1.1 * at_once < cost(24)[1]


def test_a_tag_is_the_mean_of_its_tasks(engine: HFEngine, tasks: Path, expected: dict[str, Any]) -> None:
    options: dict[str, Any] = {"task_search_path": [tasks], "limit": 20, "apply_chat_template": False}
    scorer = Scorer.build(engine, [EvalTask("choosing")], **options)
    assert scorer.describe().tasks[0].kind == "tag"
    assert scorer.describe().tasks[0].leaves == ("letters", "phrases")
    value = scorer.score_all().tasks["choosing"].value
    assert value == pytest.approx((expected["letters"]["acc,none"] + expected["phrases"]["acc,none"]) / 2)


def test_global_random_states_and_loggers_are_left_alone(right: Path) -> None:
    logger = logging.getLogger("lm_eval")
    before = random.getstate(), torch.random.get_rng_state(), (logger.handlers, logger.propagate, logger.level)
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    fake(right)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    assert (logger.handlers, logger.propagate, logger.level) == before[2]


def test_nothing_is_printed(right: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine, scorer = fake(right)
    loaded(engine, 0.5)
    scorer.score_all(stderr=True)
    assert capfd.readouterr() == ("", "")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be above 0, got 0: no documents would be left"),
        ({"holdout": 1.0}, r"holdout must be in \(0, 1\), got 1.0"),
        ({"holdout": 0.5, "limit": 1}, "task 'right': holdout 0.5 of 1 documents leaves none to search"),
        ({"apply_chat_template": True}, "the tokenizer has no chat template"),
        ({"terms": []}, "must name at least one eval task"),
        ({"terms": [EvalTask("right"), EvalTask("right", 2.0)]}, "tasks must be named once, got 'right"),
        ({"terms": [EvalTask("right"), EvalTask("right", metadata={"a": 1})]}, "named once|different settings"),
    ],
)
def test_options_that_cannot_be(right: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fake(right, **options)


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


def test_describing_needs_no_weights(model: Path, tasks: Path) -> None:
    engine = HFEngine.tokenizer_only(model)
    scorer = Scorer.build(engine, [EvalTask("letters"), EvalTask("both")], task_search_path=[tasks], n_chunks=2)
    description = scorer.describe()
    assert [(t.name, t.kind, t.metrics) for t in description.tasks] == [
        ("letters", "task", ("acc,none", "acc_norm,none")),
        ("both", "group", ("acc,none",)),
    ]
    # the letters are shared by both
    assert (description.n_documents, description.n_requests) == (24 + 30, 4 * (24 + 30))
    assert 0 < description.longest < 64
    assert description.n_tokens > 0
