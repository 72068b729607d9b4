"""Adds to each question the answer of a model that is not in the study, with which ``judged_pairs`` compares answers.

The model is asked over the OpenAI-compatible interface of a server that runs it:

    vllm serve ./another-model --port 8001
    python rivals.py http://127.0.0.1:8001/v1 ./another-model questions.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx2

MAX_TOKENS = 512
"""As ``max_gen_toks`` in the task's YAML file, so that both answers may be as long."""


def main(url: str, model: str, file: Path) -> None:
    """Write the file again, with a ``rival`` in each line."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    with httpx2.Client(timeout=600) as http:
        for row in rows:
            messages = [{"role": "user", "content": row["question"]}]
            body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
            response = http.post(f"{url}/chat/completions", json=body).raise_for_status()
            row["rival"] = response.json()["choices"][0]["message"]["content"]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
