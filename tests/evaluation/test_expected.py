from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from optuna_merge.errors import EngineError, TaskError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.evaluation.term import EvalTask
from optuna_merge.testing.conformance import TextRequest
from optuna_merge.testing.models import write_tiny_models
from tests.evaluation.task_files import EARLY, MEAN, TEMPLATE, fake, write_all, write_task

TARGETS = """
def number(doc):
    return doc["gold"]

def text(doc):
    return doc["choices"][doc["gold"]]

def broken(doc):
    return doc["nothing"]

def process(doc, results):
    return {"length": {"n": len(results[0])}}
"""


def write_more(folder: Path) -> None:
    """Tasks whose right answers are harder to find."""
    (folder / "targets.py").write_text(TARGETS)
    write_task(folder, "named", verbatim=EARLY + "metadata: {gradient_target: !function targets.number}\n")
    write_task(folder, "broken", verbatim=EARLY + "metadata: {gradient_target: !function targets.broken}\n")
    write_task(folder, "several", doc_to_choice=["A", "B", "C", "D"], doc_to_target=[0, 3])
    mutual = [{"metric": "acc_mutual_info", **MEAN}, {"metric": "acc", **MEAN}]
    write_task(folder, "mutual", metric_list=mutual)
    write_task(folder, "two", doc_to_choice=["A", "B"], doc_to_target="{{gold % 2}}", metric_list=[{"metric": "f1"}])
    generated: dict[str, Any] = {"output_type": "generate_until", "doc_to_choice": None, "n_documents": 10}
    generated |= {"generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 4}}
    match = {"metric_list": [{"metric": "exact_match", **MEAN}], "doc_to_target": ["no.thing", "nil"]}
    word = [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]
    write_task(folder, "answers", filter_list=[{"name": "word", "filter": word}], **match, **generated)
    write_task(folder, "verbatim", **match, **generated)
    length = "process_results: !function targets.process\nmetric_list:\n- {metric: length, aggregation: mean}\n"
    write_task(folder, "unclear", doc_to_target="t", verbatim=length, **generated)
    own = "metadata: {gradient_target: !function targets.text}\n"
    write_task(folder, "own_text", doc_to_target="t", verbatim=length + own, **generated)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_all(tmp_path_factory.mktemp("expected") / "tasks")
    write_more(folder)
    return folder


class Model:
    """A tiny model in float64 whose expected score is a function of one number, along a random direction."""

    def __init__(self, folder: Path) -> None:
        _, [path] = write_tiny_models(folder, 1, "gpt2", n_layers=1, spread=0.3)  # transformers computes it in float64
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
        self.engine = HFEngine(path, device="cpu", dtype=cast(Any, "float64"))
        self._weights = {k: tensor.double() for k, tensor in load_file(path / "model.safetensors").items()}
        generator = torch.Generator().manual_seed(0)
        self._direction = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for name, tensor in self._weights.items()
        }

    def move(self, distance: float) -> None:
        self.engine.load_weights((k, w + distance * self._direction[k]) for k, w in self._weights.items())

    def slopes(self, scorer: Scorer) -> tuple[float, float]:
        """The slope of the expected score along the direction, by its gradient and by a central difference."""
        slopes: list[float] = []

        def sink(name: str, gradient: Tensor) -> None:
            slopes.append(float((gradient * self._direction[name]).sum()))

        self.move(0)
        scorer.differentiate_chunk(0, sink, generate=False)
        values = []
        for distance in (1e-5, -1e-5):
            self.move(distance)
            values.append(scorer.differentiate_chunk(0, lambda *_: None, generate=False).value)
        self.move(0)
        return sum(slopes), (values[0] - values[1]) / 2e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


def build(model: Model, tasks: Path, *terms: EvalTask, **options: Any) -> Scorer:
    model.move(0)
    return Scorer.build(model.engine, terms, task_search_path=[tasks], **{"n_chunks": 2, **options})


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("letters", "acc"),
        ("phrases", "acc_norm"),
        ("several", "acc"),
        ("mutual", "acc_mutual_info"),
        ("mutual", "acc"),
        ("two", "f1"),
        ("early", "is_early"),
        ("named", "spread"),
        ("cloze", "acc"),
        ("cloze", "perplexity"),
        ("prose", "word_perplexity"),
        ("prose", "bits_per_byte"),
        ("telling", "exact_match,first"),
        ("answers", "exact_match"),
        ("own_text", "length"),
        ("both", "acc"),
    ],
)
def test_the_gradient_of_each_metric_is_a_central_difference(model: Model, tasks: Path, name: str, metric: str) -> None:
    scorer = build(model, tasks, EvalTask(name, -2.0, metric), apply_chat_template=name in ("several", "answers"))
    by_gradient, by_difference = model.slopes(scorer)
    assert by_gradient == pytest.approx(by_difference, rel=1e-5)
    assert by_gradient != 0


def test_the_pass_is_a_score_and_terms_are_weighted_as_in_it(model: Model, tasks: Path) -> None:
    terms = [EvalTask("both", 2.0, "acc"), EvalTask("each", -1.0, "acc"), EvalTask("early", 3.0, "spread")]
    terms += [EvalTask("telling", 0.5, "exact_match,whole"), EvalTask("cloze", 0.001, "perplexity")]
    scorer = build(model, tasks, *terms, n_chunks=1)
    found = scorer.differentiate_chunk(0, lambda *_: None, generate=True)
    expected = scorer.score_chunk(0)
    assert found.scored is not None
    assert found.scored.score == pytest.approx(expected.score, rel=1e-9)
    assert found.scored.documents.keys() == expected.documents.keys()
    assert found.scored.documents["phrases"] == expected.documents["phrases"]
    assert found.scored.documents["telling"] == expected.documents["telling"]
    # a spread is no number for each document, so it is left out
    assert found.tasks.keys() == {"both", "each", "telling", "cloze"}
    assert found.value == pytest.approx(
        2 * found.tasks["both"] - found.tasks["each"] + 0.5 * found.tasks["telling"] + 0.001 * found.tasks["cloze"]
    )
    # 24 and 30 documents: by size, and each task alike
    one = {name: build(model, tasks, EvalTask(name), n_chunks=1) for name in ("letters", "phrases")}
    letters, phrases = (one[n].differentiate_chunk(0, lambda *_: None, generate=False).value for n in one)
    assert found.tasks["both"] == pytest.approx((24 * letters + 30 * phrases) / 54)
    assert found.tasks["each"] == pytest.approx((letters + phrases) / 2)
    # a perplexity is its own stand-in
    assert found.tasks["cloze"] == pytest.approx(scorer.total([expected]).tasks["cloze"].value)

    without = scorer.differentiate_chunk(0, lambda *_: None, generate=False)
    assert without.scored is None
    assert (without.value, without.tasks) == (found.value, found.tasks)


@pytest.mark.parametrize(
    ("name", "chat", "text"),
    # as an example would show it, as a turn of the assistant, and as the metric wants it
    [("answers", False, " nil"), ("answers", True, "nil"), ("verbatim", False, "nil")],
)
def test_a_generated_answer_is_expected_by_the_probability_of_its_text(
    model: Model, tasks: Path, name: str, chat: bool, text: str
) -> None:
    """The first target would be cut at its stop sequence; behind the second any stop sequence or the end may come."""
    scorer = build(model, tasks, EvalTask(name, metric="exact_match"), n_chunks=1, apply_chat_template=chat)
    [(leaf, doc_ids)] = scorer._chunks[0].parts
    prompts = [leaf.instances[doc_id][0].args[0] for doc_id in doc_ids]
    requests = [TextRequest("loglikelihood", (p, text + end)) for p in prompts for end in ("\n", ".", "</s>")]
    responses = cast("list[tuple[float, bool]]", model.engine.respond(model.engine.prepare(requests)))
    found = scorer.differentiate_chunk(0, lambda *_: None, generate=False)
    assert found.value == pytest.approx(sum(math.exp(ll) for ll, _ in responses) / len(prompts), rel=1e-9, abs=0)


def test_choices_of_unequal_length_are_compared_as_acc_norm_does(model: Model, tasks: Path) -> None:
    scorer = build(model, tasks, EvalTask("phrases", metric="acc_norm"), n_chunks=1)
    [(leaf, doc_ids)] = scorer._chunks[0].parts
    found = scorer.differentiate_chunk(0, lambda *_: None, generate=False)
    expected = []
    for doc_id in doc_ids:
        instances = leaf.instances[doc_id]
        doc = instances[0].doc
        answers = model.engine.respond(model.engine.prepare(cast(Any, instances)))
        lengths = np.array([len(choice) for choice in doc["choices"]])
        scores = np.array([cast(Any, a)[0] for a in answers]) / lengths * lengths.mean()
        weights = np.exp(scores - scores.max())
        expected.append(weights[doc["gold"]] / weights.sum())
    assert found.value == pytest.approx(np.mean(expected))


def test_a_metric_without_a_stand_in_is_left_out(model: Model, tasks: Path) -> None:
    for name, metric in (("early", "spread"), ("unclear", "length")):
        scorer = build(model, tasks, EvalTask(name, metric=metric))
        came: list[str] = []
        found = scorer.differentiate_chunk(0, lambda name, _, came=came: came.append(name), generate=False)
        assert (found.value, found.tasks, came) == (0, {}, [])
        both = build(
            model,
            tasks,
            EvalTask(name, metric=metric),
            EvalTask("both"),
            EvalTask("telling", metric="exact_match,first"),
        )
        assert both.without_gradient() == (name,)


def test_a_target_that_raises_and_an_engine_that_cannot_differentiate_are_errors(model: Model, tasks: Path) -> None:
    scorer = build(model, tasks, EvalTask("broken", metric="spread"))
    with pytest.raises(TaskError, match="task 'broken', document 0: gradient_target raised KeyError"):
        scorer.differentiate_chunk(0, lambda *_: None, generate=False)
    _, scorer = fake(tasks, terms=[EvalTask("letters")])
    with pytest.raises(EngineError, match="must differentiate, but this one does not"):
        scorer.differentiate_chunk(0, lambda *_: None, generate=False)
