from __future__ import annotations

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
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.chunks import cut
from optuna_merge.evaluation.difference import Difference, sign_flip_p
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from tests.evaluation.task_files import fake, loaded, write_task


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
    searched, held = scorer.score_all().documents, scorer.holdout.score().documents
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
    score = scorer.holdout.score()
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
    assert scorer.holdout is None


def test_a_paired_difference_by_hand(right: Path) -> None:
    engine, scorer = fake(right, n_chunks=1)
    loaded(engine, 0.3)
    first = scorer.score_all()
    loaded(engine, 0.9)
    second = scorer.score_all()
    found = scorer.paired_difference(first, second)
    assert found.value == first.value - second.value
    variance, shares = 0.0, []
    for name, weight, n in (("right", 1, 200), ("rarely", -2, 100)):
        values = [np.array(s.documents[name]["acc,none"]) for s in (first, second)]
        variance += weight**2 * np.var(values[0] - values[1], ddof=1) / n
        shares += [weight * (a - b) / n for a, b in zip(*values, strict=True)]
    assert found.stderr == pytest.approx(math.sqrt(variance))
    assert found.p_value == pytest.approx(sign_flip_p(shares))
    assert scorer.paired_difference(first, first) == Difference(0.0, 0.0, 1.0)
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
    found = scorer.paired_difference(first, second)
    assert found.value != 0
    assert 0 < found.stderr < abs(first.value)
    assert 0 < found.p_value <= 1
    assert scorer.paired_difference(first, second) == found


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


def test_chunks_of_generated_texts(tiny_models: Path, tmp_path: Path) -> None:
    """A step costs about as much for one text as for thirty: chunks are many only where they are full, or much else is.

    A text of 16 tokens takes 15 steps, each of which costs as much as some 100 tokens of a prompt.
    """
    settings: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "t", "doc_to_choice": None}
    settings |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    settings |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 16}}
    write_task(tmp_path, "few", n_documents=20, **settings)
    write_task(tmp_path, "many", n_documents=400, **settings)
    write_task(tmp_path, "chosen", n_documents=300)
    engine = HFEngine(tiny_models / "base", device="meta")

    def chunks(*names: str) -> int:
        terms = [EvalTask(name, metric="acc" if name == "chosen" else "exact_match") for name in names]
        scorer = Scorer.build(engine, terms, task_search_path=[tmp_path])
        [whole] = cut(engine, scorer._terms, 1, 1, 0)
        assert sum(chunk.prepared.cost for chunk in scorer._chunks) <= 1.1 * whole.prepared.cost
        return scorer.n_chunks

    assert chunks("few") == 1
    assert 4 <= chunks("many") <= 7
    assert 1 <= chunks("few", "chosen") < chunks("chosen")


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
