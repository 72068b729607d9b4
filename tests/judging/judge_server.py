"""A judge behind the OpenAI-compatible interface, as a process of its own: deterministic, with faults on demand.

``python judge_server.py PORT FOLDER`` answers until it is killed. ``FOLDER/faults.json`` lists what happens to the
first chats, in order: ``429``, ``500``, ``silence``, ``half``, ``outside``, ``nonsense``, ``slow``, ``never``,
``drip`` or ``death``; later ones are answered, unless the last fault is ``nonsense`` or ``never``, which stays. Each
chat adds a line to ``FOLDER/log.jsonl``, which also counts on when the server is started again. A question of one token
asks only whether the model is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "judge-7b"
UNLISTED = "./judge-in-a-folder"
KEY = "sk-very-secret-4711"
SILENCE_S = 1.5
SLOW_S = 0.3
LOCK = threading.Lock()


def score(prompt: str) -> int:
    """From 1 to 5, the same for the same prompt. Of two answers that with ``right`` in it is better, else the first."""
    if "Answer A:" in prompt:
        first, second = prompt.split("Answer A:")[1].split("Answer B:")
        return int("right" in first or "right" not in second)
    return 1 + hashlib.sha256(prompt.encode()).digest()[0] % 5


class Handler(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, text: str, **headers: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "")
        if given != f"Bearer {KEY}":
            self.send(401, json.dumps({"error": f"no such key: {given}, the key is {KEY}"}))
        return given == f"Bearer {KEY}"

    def do_GET(self) -> None:
        if not self.path.startswith("/v1/"):
            self.send(404, "not here")
        elif self.is_allowed():
            self.send(200, json.dumps({"data": [{"id": MODEL}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        if body["model"] not in (MODEL, UNLISTED):
            self.send(404, json.dumps({"error": f"no model {body['model']}"}))
            return
        if "colour" in body:
            self.send(400, json.dumps({"error": "no such option: colour"}))
            return
        if body.get("structured_outputs", {}).get("regex") == "[":
            self.send(500, "no such grammar")
            return
        if body["max_tokens"] == 1:
            self.send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": "Hi"}}]}))
            return
        prompt, choices = body["messages"][0]["content"], body.get("structured_outputs", {}).get("choice", [])
        log = self.folder / "log.jsonl"
        with LOCK:
            faults = json.loads((self.folder / "faults.json").read_text())
            number = len(log.read_text().splitlines()) if log.exists() else 0
            stays = faults and faults[-1] in ("nonsense", "never")
            fault = faults[min(number, len(faults) - 1)] if number < len(faults) or stays else ""
            with log.open("a") as file:
                file.write(json.dumps({"prompt": prompt, "fault": fault}) + "\n")
        self.answer(prompt, fault, *choices[:1])

    def answer(self, prompt: str, fault: str, said: str = "") -> None:
        said = said or f"It is fine; the key was {KEY}.\nScore: {score(prompt)}"
        said = {"outside": "Superb!\nScore: 11", "nonsense": "I would rather not say."}.get(fault, said)
        message = {"role": "assistant", "content": said}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        text = json.dumps({"choices": [{"message": message}], "usage": usage})
        if fault == "death":
            os._exit(1)
        elif fault == "silence":
            time.sleep(SILENCE_S)
            self.close_connection = True
        elif fault == "never":
            time.sleep(600)
        elif fault == "drip":  # the connection is kept alive, and nothing comes
            self.send_response(200)
            self.end_headers()
            for _ in range(600):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif fault == "slow":
            time.sleep(SLOW_S)
            self.send(200, text)
        elif fault == "429":
            self.send(429, "too many", Retry_After="0.2")
        elif fault == "500":
            self.send(500, "oh no")
        else:
            self.send(200, text[: len(text) // 2] if fault == "half" else text)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[2])
    ThreadingHTTPServer.allow_reuse_address = True
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
