"""Trains the quickstart's models: a small base and three fine-tunes of it, each with a skill of its own.

The base is trained on a corpus of letters: runs of the alphabet, lists that are echoed, and the questions of all
three skills, nearly all of them answered by a guess. So it learns the form of a question, but hardly any rule. Each
fine-tune starts from the base and is trained on one skill's questions with right answers, mixed with the base's corpus
so that it forgets nothing. Nothing here looks at a merge or at a document of the eval tasks. The rules are in
``quickstart_tasks/letters.py``, and so is the split that keeps the documents' lists out of training.

On one machine, the same settings give the same bytes: one thread of one process trains each model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import OptunaMergeError
from optuna_merge.quickstart.quickstart_tasks.letters import (
    ALPHABET,
    N_LETTERS,
    RULES,
    draw_letters,
    guess,
    question,
    spaced,
)

if TYPE_CHECKING:
    from torch import Tensor

BASE = "base"
_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_SILENT_S = 10.0
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
        out: Folder that gets ``base``, one folder for each skill, and beside each, when it is complete, a file with
            the settings, such as ``base.json``. A call that was interrupted can be repeated: what is complete is kept.
        settings: What to train.
        n_processes: How many fine-tunes are trained at the same time; does not change the result.
        say: Called with each line of progress.

    Returns:
        Whether anything was trained: False if ``out`` holds complete models of these settings.

    Raises:
        OptunaMergeError: If a process that trains a fine-tune ends early.
        OSError: If a file cannot be written.
    """
    names = (BASE, *RULES)
    wanted = _settings_file(settings)
    is_there = {name: (out / name).is_dir() and _read(out / f"{name}.json") == wanted for name in names}
    missing = list(names) if not is_there[BASE] else [name for name in names if not is_there[name]]
    if not missing:
        say(f"{out} already holds the models of these settings; nothing to do")
        return False
    out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        (out / f"{name}.json").unlink(missing_ok=True)
    started = time.monotonic()
    if BASE in missing:
        say(f"training {BASE} ({settings.base_steps} steps)")
        train_base(out / BASE, settings, say)
    skills = [name for name in missing if name != BASE]
    say(f"training {', '.join(skills)} ({settings.skill_steps} steps each); {time.monotonic() - started:.0f} s so far")
    _train_skills(out, skills, settings, n_processes)
    say(f"{out}: {', '.join(missing)} trained in {time.monotonic() - started:.0f} s")
    return True


def _train_skills(out: Path, skills: Sequence[str], settings: Settings, n_processes: int) -> None:
    if n_processes == 1:
        for skill in skills:
            train_skill(out / skill, out / BASE, skill, settings)
        return
    context = multiprocessing.get_context("spawn")  # because a forked copy of torch's thread pool may hang
    waiting = {
        skill: context.Process(target=_train_skill_alone, args=(out / skill, out / BASE, skill, settings))
        for skill in skills
    }
    running: dict[str, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_processes:
                skill = next(iter(waiting))
                running[skill] = waiting.pop(skill)
                running[skill].start()
            wait([process.sentinel for process in running.values()])
            for skill in [skill for skill, process in running.items() if not process.is_alive()]:
                process = running.pop(skill)
                if process.exitcode != 0:
                    raise OptunaMergeError(
                        f"{out / skill}: its training must end with code 0, got {process.exitcode}; see the lines"
                        " above, then repeat the command, which keeps the models that are complete"
                    )
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _train_skill_alone(folder: Path, base: Path, skill: str, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    train_skill(folder, base, skill, settings)


def train_base(folder: Path, settings: Settings, say: Callable[[str], None] = lambda _: None) -> None:
    """Train the tokenizer and the base from scratch; write both to ``folder``. ``say`` is called every ten seconds."""
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
    said = time.monotonic()

    def on_step(step: int) -> None:
        nonlocal said
        if time.monotonic() - said > _SILENT_S:
            said = time.monotonic()
            say(f"{BASE}: {step} of {settings.base_steps} steps")

    _train(model, tokenizer, texts, settings.base_steps, settings.base_learning_rate, settings.batch_size, on_step)
    _save(model, tokenizer, folder, settings)


def train_skill(folder: Path, base: Path, skill: str, settings: Settings) -> None:
    """Fine-tune the model in ``base`` on one skill; write it to ``folder``, with the same tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _be_quiet_on_one_thread()
    rng = random.Random(f"{settings.seed} {skill}")
    texts = skill_texts(rng, skill, settings.replay_share, settings.base_right_share)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    _train(model, tokenizer, texts, settings.skill_steps, settings.skill_learning_rate, settings.batch_size)
    _save(model, tokenizer, folder, settings)


def _be_quiet_on_one_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    cast(Any, logging).disable_progress_bar()


def _train_tokenizer(texts: list[str]) -> Any:
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
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_PAD
    )


def _train(
    model: Any,
    tokenizer: Any,
    texts: Iterator[Text],
    n_steps: int,
    learning_rate: float,
    batch_size: int,
    on_step: Callable[[int], None] = lambda _: None,
) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, n_steps))
    model.train()
    for step in range(n_steps):
        on_step(step)
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


def _batch(tokenizer: Any, texts: list[Text]) -> tuple[Tensor, Tensor]:
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


def _save(model: Any, tokenizer: Any, folder: Path, settings: Settings) -> None:
    """Write a model, and when it is complete the file with its settings beside it."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as own:
        partial = Path(own) / folder.name
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    write_atomically(folder.with_suffix(".json"), json.dumps(_settings_file(settings), indent=2) + "\n")


def _settings_file(settings: Settings) -> dict[str, Any]:
    return {"digest": _digest(settings), **dataclasses.asdict(settings)}


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
