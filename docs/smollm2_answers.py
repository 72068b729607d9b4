"""Put the same question to the base, the fine-tune and the merge: the answers of ``docs/smollm2.md``.

    optuna-merge export studies/smollm2.yaml studies/smollm2_models/merged
    python docs/smollm2_answers.py studies/smollm2_models

Prints a Markdown table with the first document of each eval task. A written answer is decoded greedily; of choices the
likeliest is shown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval_tasks" / "smollm2"))

from skills import SKILLS, Question, documents
from smollm2_models import prompt


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Print the answers of SmolLM2, its fine-tunes and their merge.")
    parser.add_argument("models", type=Path, help="folder with base, merged and the fine-tunes")
    models = parser.parse_args().models
    print("| question | right | base | fine-tune | best merge |\n|---|---|---|---|---|")
    for skill in SKILLS:
        document = documents(skill, 1, seed=11)["test"][0]
        question = Question(document["question"], document["answer"], tuple(document["choices"]))
        answers = [answer(models / name, question) for name in ("base", skill, "merged")]
        print("|", " | ".join(" ".join(text.split()) for text in (question.text, question.answer, *answers)), "|")


@torch.inference_mode()
def answer(folder: Path, question: Question) -> str:
    """What the model in a folder answers, at most 16 tokens, or the choice that it finds likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = prompt(tokenizer, question.text)
    if question.choices:
        return max(question.choices, key=lambda choice: _log_likelihood(model, tokenizer, read, choice))
    written = model.generate(torch.tensor([read]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(written[0, len(read) :], skip_special_tokens=True))


def _log_likelihood(model, tokenizer, read: list[int], choice: str) -> float:
    learned = tokenizer(choice, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([read + learned])).logits[0, len(read) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(learned)[:, None]).sum())


if __name__ == "__main__":
    main()
