"""Train the quickstart's models: a small base and three fine-tunes of it, each with a skill of its own.

    python studies/quickstart_models.py

The base is trained on a corpus of letters: runs of the alphabet, lists that are echoed, and the questions of all
three skills, nearly all of them answered by a guess. So it learns the form of a question, but hardly any rule. Each
fine-tune starts from the base and is trained on one skill's questions with right answers, mixed with the base's corpus
so that it forgets nothing. Nothing here looks at a merge or at a document of the eval tasks. The rules are in
``eval_tasks/quickstart/letters.py``, and so is the split that keeps the documents' lists out of training.

On one machine, the same settings give the same bytes: one thread of one process trains each model.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval_tasks" / "quickstart"))

from letters import ALPHABET, N_LETTERS, RULES, draw_letters, guess, question, spaced

from optuna_merge.atomic import write_atomically

BASE = "base"
_MARKER = "settings.json"
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_IGNORED = -100  # the label that transformers' loss leaves out

Text = tuple[str, str]  # the part that is only read, and the part that is learned


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained. The model is a Llama of these sizes."""

    seed: int = 7
    n_layers: int = 6
    hidden_size: int = 64
    intermediate_size: int = 160
    n_heads: int = 4
    batch_size: int = 64
    base_steps: int = 350
    base_learning_rate: float = 2e-3
    base_right_share: float = 0.03  # share of the base's questions with right answers; the others get a guess
    skill_steps: int = 120
    skill_learning_rate: float = 1e-3
    replay_share: float = 0.5  # share of a fine-tune's texts that come from the base's corpus
    tokenizer_texts: int = 2000


def base_texts(rng: random.Random, right_share: float, skip: str | None = None) -> Iterator[Text]:
    """An endless corpus of letters: on average two runs of the alphabet and two echoes for six questions.

    Args:
        rng: Makes all random draws.
        right_share: Share of the questions whose answer follows the rule, in [0, 1].
        skip: A skill whose questions are left out.
    """
    skills = [skill for skill in RULES if skill != skip]
    while True:
        kind = rng.random()
        if kind < 0.2:
            start = rng.randrange(len(ALPHABET))
            yield "", f"say: {spaced((ALPHABET * 2)[start : start + rng.randint(6, 10)])}"
        elif kind < 0.4:
            letters = draw_letters(rng, for_documents=False, length=rng.randint(N_LETTERS - 1, N_LETTERS + 1))
            yield "", f"say: {spaced(letters)}\nanswer: {spaced(letters)}"
        else:
            skill = rng.choice(skills)
            letters = draw_letters(rng, for_documents=False)
            answer = RULES[skill](letters) if rng.random() < right_share else guess(rng, skill, letters)
            yield "", f"{question(skill, letters)} {spaced(answer)}"


def skill_texts(rng: random.Random, skill: str, replay_share: float, right_share: float) -> Iterator[Text]:
    """An endless corpus: one skill's questions with right answers, mixed with ``base_texts`` without that skill."""
    replay = base_texts(rng, right_share, skip=skill)
    while True:
        if rng.random() < replay_share:
            yield next(replay)
        else:
            letters = draw_letters(rng, for_documents=False)
            yield question(skill, letters), f" {spaced(RULES[skill](letters))}"


def make_models(out: Path, settings: Settings, n_processes: int = 1, say: Callable[[str], None] = print) -> bool:
    """Train the base and one fine-tune for each skill, unless ``out`` holds them already.

    Args:
        out: Folder that gets ``base``, one folder for each skill, and last a marker file with the settings.
        settings: What to train.
        n_processes: How many fine-tunes are trained at the same time; does not change the result.
        say: Called with each line of progress.

    Returns:
        Whether anything was trained: False if ``out`` holds complete models of these settings.
    """
    marker = out / _MARKER
    wanted = {"digest": _digest(settings), **dataclasses.asdict(settings)}
    folders = [out / name for name in (BASE, *RULES)]
    if all(folder.is_dir() for folder in folders) and _read(marker) == wanted:
        say(f"{out} already holds the models of these settings; nothing to do")
        return False
    out.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    started = time.monotonic()
    say(f"training {BASE} ({settings.base_steps} steps)")
    train_base(out / BASE, settings)
    say(f"training {', '.join(RULES)} ({settings.skill_steps} steps each); {time.monotonic() - started:.0f} s so far")
    if n_processes == 1:
        for skill in RULES:
            train_skill(out / skill, out / BASE, skill, settings)
    else:
        # Spawned, because a forked copy of torch's thread pool may hang.
        with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(train_skill, out / skill, out / BASE, skill, settings) for skill in RULES]
            for future in futures:
                future.result()
    write_atomically(marker, json.dumps(wanted, indent=2) + "\n")
    say(f"{out}: {', '.join((BASE, *RULES))} trained in {time.monotonic() - started:.0f} s")
    return True


def train_base(folder: Path, settings: Settings) -> None:
    """Train the tokenizer and the base from scratch; write both to ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _be_quiet_on_one_thread()
    rng = random.Random(f"{settings.seed} {BASE}")
    texts = base_texts(rng, settings.base_right_share)
    tokenizer = _train_tokenizer(["".join(next(texts)) for _ in range(settings.tokenizer_texts)])
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=settings.n_heads,
            num_key_value_heads=settings.n_heads,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _train(model, tokenizer, texts, settings.base_steps, settings.base_learning_rate, settings.batch_size)
    _save(model, tokenizer, folder)


def train_skill(folder: Path, base: Path, skill: str, settings: Settings) -> None:
    """Fine-tune the model in ``base`` on one skill; write it to ``folder``, with the same tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _be_quiet_on_one_thread()
    rng = random.Random(f"{settings.seed} {skill}")
    texts = skill_texts(rng, skill, settings.replay_share, settings.base_right_share)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    _train(model, tokenizer, texts, settings.skill_steps, settings.skill_learning_rate, settings.batch_size)
    _save(model, tokenizer, folder)


def _be_quiet_on_one_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD)


def _train(model, tokenizer, texts: Iterator[Text], n_steps: int, learning_rate: float, batch_size: int) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    model.train()
    for _ in range(n_steps):
        tokens, labels = _batch(tokenizer, [next(texts) for _ in range(batch_size)])
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _rate(step: int, n_steps: int) -> float:
    """Factor of the learning rate: a warm-up of at most 50 steps, then 1 until half-way, then linearly down to 0.02."""
    warm_up = min(50, max(1, n_steps // 2))
    return min(1.0, (step + 1) / warm_up, max(0.02, 2 * (1 - step / n_steps)))


def _batch(tokenizer, texts: list[Text]):
    import torch

    read = tokenizer([read for read, _ in texts])["input_ids"]
    learned = tokenizer([learned + _EOS for _, learned in texts])["input_ids"]
    width = max(len(a) + len(b) for a, b in zip(read, learned, strict=True))
    # Padded on the right, so no attention mask is needed: in a causal model earlier positions do not see later ones.
    tokens = torch.full((len(texts), width), tokenizer.pad_token_id)
    labels = torch.full((len(texts), width), _IGNORED)
    for row, (before, after) in enumerate(zip(read, learned, strict=True)):
        end = len(before) + len(after)
        tokens[row, :end] = torch.tensor(before + after)
        labels[row, len(before) : end] = torch.tensor(after)
    return tokens, labels  # both [batch_size, width]


def _save(model, tokenizer, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as own:
        partial = Path(own) / folder.name
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


def _digest(settings: Settings) -> str:
    """A digest of the settings and of the first texts that they give, so that a changed rule changes it too."""
    corpora = [base_texts(random.Random(0), settings.base_right_share)]
    corpora += [skill_texts(random.Random(0), s, settings.replay_share, settings.base_right_share) for s in RULES]
    samples = [next(texts) for texts in corpora for _ in range(100)]
    return hashlib.sha256(json.dumps([dataclasses.asdict(settings), samples]).encode()).hexdigest()


def _read(marker: Path) -> object:
    try:
        return json.loads(marker.read_text())
    except (OSError, ValueError):
        return None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the quickstart's base model and its three fine-tunes.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "quickstart_models",
        help="folder for the models (default: %(default)s)",
    )
    n_processes = min(len(RULES), os.cpu_count() or 1)
    make_models(parser.parse_args().out, Settings(), n_processes, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
