"""Examines architectures of transformers, each in a process of its own, and writes a table of ``docs/models.md``.

    python -m tests.architectures.walk                      all of them: half an hour on an idle core
    python -m tests.architectures.walk --quick              without the second merge
    python -m tests.architectures.walk llama mamba          some; prints, and writes nothing
    python -m tests.architectures.walk --senses             the table of models that also see or hear, instead

A process that crashes or hangs is one line of the table, and the walk goes on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from tests.architectures.examine import Outcome, examine
from tests.architectures.senses import examine_with_senses
from tests.architectures.tiny import MODEL_TYPES, VISION_TYPES

LIMIT_S = 300
TABLE = Path(__file__).parents[2] / "docs" / "models.md"

_HEAD = """\
# Models

Written by `python -m tests.architectures.walk`, with transformers {version}; do not edit it by hand.

transformers has {n_all} architectures under `AutoModelForCausalLM`. **{n_works} work, {n_refused} are refused, and \
{n_not_built} could not be tried.**

Of each, a tiny random base model and two fine-tunes are written and opened, merged by `linear` and by `ties`, loaded \
into the transformers engine, scored, exported, and loaded again by transformers. An architecture works if

- every tensor of every model is in the merge,
- the weights that transformers loads are the weighted sum of the weights that it loads from the fine-tunes, and equal \
those that were scored,
- log-likelihoods and generated texts are those of lm-eval's `HFLM` on the exported model, with a batch size of 1.

"Fast" means: continuations of one context are computed in one row, beginnings that many prompts share once for each \
merge, and texts by our own decoder. Otherwise the table says what is done the slow way; an engine finds out on a few \
tokens of the first prompt. Sizes are tiny and weights random, so the table says nothing about memory, speed or \
half precision. Models that bring their own code are not in it.

Sparse attention that keeps the best-scored tokens (`deepseek_v32`, `glm_moe_dsa`, `dots3_note_text` and others) \
depends on a row's padding if tokens score exactly the same, and so do lm-eval's scores. `dots3_note_text` has 32 \
index heads here: with 8 heads, several tokens scored exactly 0.

| architecture | class | result | |
|---|---|---|---|
"""
_MARK = "## Models that also see or hear\n"
_SENSES_HEAD = """
One model of a merge, the base or another, may also see or hear if the others have the tensors of its language part, \
under whatever prefix: a vision-language model and Japanese language models, with either it or the language model it \
was made from as base. The merged model is that model with another language part. Its configuration, tokenizer, \
processor and other tensors, such as a vision tower, are copied, and `check` names the tensors. Text tasks score it, \
by transformers; `engine.backend: vllm` is refused. `export` writes the whole model. mergekit cannot make it.

- Refused: language models of another family or depth; a tensor that only some of the models have, by name; a second \
model that sees or hears; any other `tokenizer_source` than that model, whose configuration names the tokens of \
images by id.
- Several models that see or hear, of one architecture, are merged in all tensors, without language models among \
them. Tensors of a vision tower then have the weights of the head, or of the embedding if their name says so.
- Sequence classifiers and reward models are not scored. That would take an engine that reads class scores, eval \
tasks that ask for them, and a rule for output heads of other shapes, which fine-tunes do not share.

transformers {version} has {n_types} architectures under `AutoModelForImageTextToText`. {n_all} of them are in the \
table: **{n_works} work, {n_refused} are refused, and {n_not_built} could not be tried**, for want of a tiny model \
or of a causal model of the type of their language part.

Of each, two such language models are merged into it by `linear`. The decoder and the output head that transformers \
loads from the export must be the weighted sum of theirs, all other tensors the whole model's, and log-likelihoods \
and texts those of lm-eval's `HFLM` on the model that transformers loads.

| architecture | class | result | |
|---|---|---|---|
"""
_RESULTS = {"works": "works", "refused": "refused", "not built": "not tried", "wrong": "**wrong**"}


def main() -> None:
    """Examine what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="ARCHITECTURE", help="as model_type in config.json")
    parser.add_argument("--quick", action="store_true", help="merge by linear alone")
    parser.add_argument("--senses", action="store_true", help="models that also see or hear")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a new process would otherwise copy all that this one has loaded
    try_one = examine_with_senses if args.senses else functools.partial(examine, is_quick=args.quick)
    outcomes = []
    for model_type in args.model_types or (VISION_TYPES if args.senses else MODEL_TYPES):
        outcomes.append(in_its_own_process(model_type, try_one))
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    if not args.model_types:
        write(outcomes, with_senses=args.senses)


def write(outcomes: Sequence[Outcome], *, with_senses: bool) -> None:
    """Replace one of the two tables."""
    written = TABLE.read_text(encoding="utf-8")
    causal, mark, senses = written.partition(_MARK)
    if with_senses:
        TABLE.write_text(causal + mark + table(outcomes, _SENSES_HEAD), encoding="utf-8")
    else:
        TABLE.write_text(table(outcomes, _HEAD) + "\n" + mark + senses, encoding="utf-8")


def in_its_own_process(model_type: str, try_one: Callable[[str, Path], Outcome]) -> Outcome:
    """What an examination returns, or an outcome that says how its process ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_examine, args=(model_type, Path(folder), try_one, sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(LIMIT_S):
                outcome: Outcome = receiver.recv()
                return outcome
            return Outcome(model_type, "", "wrong", f"takes more than {LIMIT_S} s")
        except EOFError:
            process.join()
            return Outcome(model_type, "", "wrong", f"its process ended with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()


def table(outcomes: Sequence[Outcome], text: str) -> str:
    """A table of ``docs/models.md`` below its text."""
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in _RESULTS}
    head = text.format(
        version=transformers.__version__,
        n_all=len(outcomes),
        n_types=len(VISION_TYPES),
        n_works=counts["works"],
        n_refused=counts["refused"],
        n_not_built=counts["not built"],
    )
    if counts["wrong"]:
        head = head.replace("\n\nOf each", f"\n\n**{counts['wrong']} come out wrong.**\n\nOf each")
    rows = [
        f"| `{one.model_type}` | {one.model_class} | {_RESULTS[one.status]} | {_cell(one.reason or one.notes)} |"
        for one in sorted(outcomes, key=lambda outcome: outcome.model_type)
    ]
    return head + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _examine(model_type: str, folder: Path, try_one: Callable[[str, Path], Outcome], sender: Connection) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sender.send(try_one(model_type, folder))


if __name__ == "__main__":
    main()
