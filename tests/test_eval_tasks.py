"""The example's eval tasks, from a local miniature of their datasets to a score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from optuna_merge.data import prepare_data
from optuna_merge.errors import TaskError

ROOT = Path(__file__).resolve().parent.parent
STUDY = yaml.safe_load((ROOT / "studies" / "spartqa_alpaca.yaml").read_text())
NAMES = ["alpaca_prompt_format", "spartqa_train"]


def places(n: int) -> list[dict[str, Any]]:
    return [
        {
            "story": f"There are blocks A and B. Block A holds {i} squares.",
            "question": f"What is left of square {i}?",
            "candidate_answers": ["block A", "block B", "both of them", "none of them"][: 3 + i % 2],
            "answer": i % 3,
        }
        for i in range(n)
    ]


def chats(n: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"Count to {i}.",
            "input": "" if i % 4 else "slowly",
            "output": f"One,\ntwo, ... {i}.",
            "text": "not used",
        }
        for i in range(n)
    ]


def prepare(folder: Path, n_places: int = 1100, n_chats: int = 700) -> Path:
    """Copy the example's task files to ``folder`` and prepare their documents from a local miniature."""
    tasks = folder / "eval_tasks"
    tasks.mkdir()
    for name in NAMES:
        for suffix in (".yaml", ".py"):
            shutil.copy(ROOT / "eval_tasks" / f"{name}{suffix}", tasks)
    for dataset, rows in (("metaeval__spartqa-mchoice", places(n_places)), ("vicgalle__alpaca-gpt4", chats(n_chats))):
        (folder / "source" / dataset).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / "source" / dataset / "train-00000-of-00001.parquet")
    prepare_data([task["name"] for task in STUDY["tasks"]], [tasks], folder / "source")
    return tasks


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("example"))


def load(tasks_dir: Path, name: str, **metadata: object) -> Any:
    manager = TaskManager(include_path=str(tasks_dir), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def context(task: Any, doc: dict[str, Any]) -> str:
    return str(task.fewshot_context(doc, num_fewshot=0))


def test_the_study_names_the_models_and_tasks_of_the_example() -> None:
    assert STUDY["genome"]["models"] == [
        "NousResearch/Hermes-2-Pro-Mistral-7B",
        "PocketDoc/Dans-AdventurousWinds-Mk2-7b",
        "HuggingFaceH4/zephyr-7b-beta",
    ]
    assert {task["name"]: (task["weight"], task["metric"]) for task in STUDY["tasks"]} == {
        "alpaca_prompt_format": (0.4, "acc,none"),
        "spartqa_train": (0.6, "acc,none"),
    }
    assert (ROOT / "studies" / STUDY["task_search_path"]).resolve() == ROOT / "eval_tasks"
    first_line = (ROOT / "studies" / "spartqa_alpaca.yaml").read_text().splitlines()[0]
    assert first_line.startswith("# ")
    assert first_line.endswith("?")


@pytest.mark.parametrize(("name", "n"), [("spartqa_train", 1000), ("alpaca_prompt_format", 500)])
def test_as_many_documents_as_the_example_asks_for(tasks_dir: Path, name: str, n: int) -> None:
    assert len(load(tasks_dir, name).test_docs()) == n


def test_the_samples_are_those_of_the_example(tasks_dir: Path) -> None:
    drawn = Dataset.from_list(places(1100)).shuffle(seed=9163).select(range(1000))
    assert [doc["story"] for doc in load(tasks_dir, "spartqa_train").test_docs()] == list(drawn["story"])
    frame = Dataset.from_list(chats(700)).to_pandas()
    sampled = frame[frame["input"] == ""].sample(n=500, replace=False, random_state=749)
    docs = load(tasks_dir, "alpaca_prompt_format").test_docs()
    assert [doc["instruction"] for doc in docs] == sampled["instruction"].tolist()


def test_spartqa_train_asks_in_letters(tasks_dir: Path) -> None:
    task = load(tasks_dir, "spartqa_train")
    docs = {doc["question"]: doc for doc in task.test_docs()}
    doc = docs["What is left of square 7?"]
    assert context(task, doc) == (
        "Context:\n"
        "There are blocks A and B. Block A holds 7 squares.\n"
        "\n"
        "Question: What is left of square 7?\n"
        "A. block A\n"
        "B. block B\n"
        "C. both of them\n"
        "D. none of them\n"
        "Answer:"
    )
    assert task.doc_to_choice(doc) == ["A", "B", "C", "D"]
    assert task.doc_to_target(doc) == 1
    assert task.config.target_delimiter == " "
    doc = docs["What is left of square 6?"]
    assert context(task, doc).endswith("\nB. block B\nC. both of them\nAnswer:")
    assert task.doc_to_choice(doc) == ["A", "B", "C"]


def test_alpaca_prompt_format_asks_what_follows_a_whole_response(tasks_dir: Path) -> None:
    task = load(tasks_dir, "alpaca_prompt_format")
    doc = {doc["instruction"]: doc for doc in task.test_docs()}["Count to 3."]
    assert context(task, doc) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Count to 3.\n"
        "\n"
        "### Response:\n"
        "One,\n"
        "two, ... 3."
    )
    choices = task.doc_to_choice(doc)
    assert sorted(choices) == ["### Instruction:", "</s>", "<|im_end|>", "<|im_start|>", "USER:"]
    assert choices[task.doc_to_target(doc)] == "</s>"
    task.build_all_requests(limit=1)
    assert [request.args[1] for request in task.instances] == choices


@pytest.mark.parametrize(
    ("eos_text", "wrong"),
    [
        ("<|eot|>", ["### Instruction:", "<|im_end|>", "<|im_start|>", "USER:"]),
        ("<|im_end|>", ["### Instruction:", "<|im_start|>", "USER:"]),
    ],
)
def test_the_end_of_sequence_text_is_configurable(tasks_dir: Path, eos_text: str, wrong: list[str]) -> None:
    task = load(tasks_dir, "alpaca_prompt_format", eos_text=eos_text)
    doc = task.test_docs()[0]
    choices = task.doc_to_choice(doc)
    assert choices.pop(task.doc_to_target(doc)) == eos_text
    assert sorted(choices) == wrong


def test_another_task_file_may_include_this_one_with_its_own_end_of_sequence_text(
    tasks_dir: Path, tmp_path: Path
) -> None:
    text = {"include": str(tasks_dir / "alpaca_prompt_format.yaml"), "task": "mine", "metadata": {"eos_text": "<eos>"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text))
    task = load(tmp_path, "mine")
    doc = task.test_docs()[0]
    assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == "<eos>"


@pytest.mark.parametrize("eos_text", ["", "  ", 2, None])
def test_an_end_of_sequence_text_that_is_none_is_refused(tasks_dir: Path, eos_text: object) -> None:
    with pytest.raises(TaskError, match=r"alpaca_prompt_format: metadata.eos_text must be .* as text, got"):
        load(tasks_dir, "alpaca_prompt_format", eos_text=eos_text)


@pytest.mark.parametrize("name", NAMES)
def test_documents_that_are_not_prepared_name_the_command_that_prepares_them(
    tasks_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks_dir)  # the folder does not depend on where one stands
    with pytest.raises(TaskError) as caught:
        load(tasks_dir, name, data_dir=str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path / name}.jsonl: the documents must be prepared first, no such file; "
        "run: optuna-merge prepare-data studies/spartqa_alpaca.yaml"
    )
    with pytest.raises(TaskError, match=f"{tasks_dir}/elsewhere/{name}.jsonl: the documents must be prepared first"):
        load(tasks_dir, name, data_dir="elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_answers": list("abcde")}, "candidate_answers must be 2 to 4, got 5; the choices are the letters"),
        ({"candidate_answers": ["a"]}, "candidate_answers must be 2 to 4, got 1"),
        ({"answer": 3}, "answer must be the index of one of 3 candidates, got 3"),
        ({"answer": -1}, "answer must be the index of one of 3 candidates, got -1"),
    ],
)
def test_spartqa_train_refuses_what_it_has_no_letter_for(
    tasks_dir: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    docs = [places(1)[0], places(1)[0] | change]
    (tmp_path / "spartqa_train.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    with pytest.raises(TaskError, match=f"spartqa_train.jsonl, line 2: {message}"):
        load(tasks_dir, "spartqa_train", data_dir=str(tmp_path))


def test_few_shot_examples_never_hold_the_asked_document(tasks_dir: Path) -> None:
    task = load(tasks_dir, "spartqa_train")
    task.set_fewshot_seed(1)
    for doc in task.test_docs().select(range(20)):
        prompt = task.fewshot_context(doc, num_fewshot=2)
        assert prompt.count("Answer:") == 3
        assert prompt.count(f"Question: {doc['question']}\n") == 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([doc["story"] for doc in places(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,  # far from uniform, so that no two choices tie
    )
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_that_of_the_most_likely_choice(
    tasks_dir: Path, name: str, model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    n_docs = 24
    task = load(tasks_dir, name)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    scores = evaluate(lm, {name: task}, limit=n_docs, bootstrap_iters=0)["results"][name]

    n_right = 0
    for doc in task.test_docs().select(range(n_docs)):
        prompt = context(task, doc)
        delimiter = task.config.target_delimiter
        logprobs = [_logprob(model, tokenizer, prompt, delimiter + choice) for choice in task.doc_to_choice(doc)]
        n_right += logprobs.index(max(logprobs)) == task.doc_to_target(doc)
    assert n_right > 0
    assert scores["acc,none"] == pytest.approx(n_right / n_docs)


@pytest.mark.parametrize(("eos_weight", "accuracy"), [(1.0, 1.0), (-10.0, 0.0)])
def test_alpaca_prompt_format_tells_a_model_that_ends_its_turn(
    tasks_dir: Path,
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    eos_weight: float,
    accuracy: float,
) -> None:
    constant = MistralForCausalLM(model.config).eval()  # the same distribution over tokens everywhere
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.zero_()
        constant.model.embed_tokens.weight[:, 0] = 1.0
        constant.model.norm.weight.fill_(1.0)
        constant.lm_head.weight[tokenizer.eos_token_id, 0] = eos_weight
    lm = HFLM(pretrained=constant, tokenizer=tokenizer, batch_size=8)
    task = load(tasks_dir, "alpaca_prompt_format")
    scores = evaluate(lm, {"alpaca_prompt_format": task}, limit=8, bootstrap_iters=0)["results"]
    assert scores["alpaca_prompt_format"]["acc,none"] == accuracy


def _logprob(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, continuation: str) -> float:
    n_prompt = len(tokenizer(prompt)["input_ids"])
    tokens = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
    with torch.no_grad():
        logprobs = model(tokens).logits.float().log_softmax(-1)  # [1, n_tokens, n_vocab]
    predicted = logprobs[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]  # [n_tokens - 1]
    return float(predicted[n_prompt - 1 :].sum())
