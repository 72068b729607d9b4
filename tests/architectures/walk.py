"""Examines all causal architectures of transformers, each in a process of its own, and writes ``docs/models.md``.

python -m tests.architectures.walk                      all of them, some 20 minutes
python -m tests.architectures.walk llama mamba          some; prints, and writes nothing
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.architectures.examine import Outcome, examine
from tests.architectures.tiny import MODEL_TYPES

LIMIT_S = 120


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    chosen = sys.argv[1:]
    outcomes = []
    for model_type in chosen or MODEL_TYPES:
        outcome = in_its_own_process(model_type)
        outcomes.append(outcome)
        print(json.dumps(asdict(outcome)), flush=True)


def in_its_own_process(model_type: str) -> Outcome:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_examine, args=(model_type, Path(folder), sender))
        process.start()
        sender.close()
        try:
            if receiver.poll(LIMIT_S):
                return receiver.recv()
            return Outcome(model_type, "", "wrong", f"takes more than {LIMIT_S} s")
        except EOFError:
            process.join()
            return Outcome(model_type, "", "wrong", f"the process ended with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()


def _examine(model_type: str, folder: Path, sender) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    sender.send(examine(model_type, folder))


if __name__ == "__main__":
    main()
