"""A judge: questions in, scores out. Each is asked once, several at a time, and never beyond the budget.

Knows the store and the client; does not know tasks nor trials.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from statistics import fmean

from optuna_merge.config.judge import JudgeConfig
from optuna_merge.errors import JudgeBudgetError, JudgeError, JudgementError
from optuna_merge.judging.client import JudgeClient, Pace, Reply, connected
from optuna_merge.judging.rubric import Message, Question
from optuna_merge.judging.store import Judgements

_TRIES = 3
"""How often a judge is asked for one judgement before its replies count as nonsense."""

_PAUSE_S = 0.1
_SILENT_S = 1.0
"""For how long open questions are waited for before a line says so."""

_LOG = logging.getLogger(__name__)

_Place = tuple[str, int]
"""Digest of a question, and number of the judgement."""


class Judge:
    """A judge with the scores that it has given.

    Args:
        options: Where it is and how it is asked.
        store: Its replies.
    """

    def __init__(self, options: JudgeConfig, store: Judgements) -> None:
        self.options = options
        self._store = store
        self._pace = Pace(options.requests_per_minute)
        self._lock = threading.Lock()
        self._n_open = 0
        self._client: JudgeClient | None = None
        self._is_left = threading.Event()

    @property
    def identity(self) -> str:
        """What decides a score besides the question, in words."""
        options = self.options
        extra = f", {json.dumps(options.extra_body, sort_keys=True)}" if options.extra_body else ""
        return (
            f"{options.model}, temperature {options.temperature:g}, {options.max_tokens} tokens,"
            f" {options.n_judgements} judgements{extra}"
        )

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """Scores of questions, in their order; only those that no reply is kept for are asked.

        Raises:
            JudgeError: If the judge stays away or cannot be used; what it has replied is kept.
            JudgementError: If it gives no score to a question.
            JudgeBudgetError: If the budget is used up.
        """
        keys = [self._key(question) for question in questions]
        numbers = range(self.options.n_judgements)
        wanted = {(key, n): question for key, question in zip(keys, questions, strict=True) for n in numbers}
        scores = self._store.scores(set(keys))
        missing = {place: question for place, question in wanted.items() if place not in scores}
        if missing:
            scores |= self._ask_all(missing)
        return [fmean(scores[key, n] for n in numbers) for key in keys]

    def stop(self) -> None:
        """Let :meth:`ask`, running in another thread, end as soon as the questions that are open have replies."""
        if self._client is not None:
            self._client.stopped.set()

    def leave(self) -> None:
        """Let :meth:`ask`, running in another thread, end at once, with the replies to open questions lost."""
        self._is_left.set()

    def _ask_all(self, missing: Mapping[_Place, Question]) -> dict[_Place, float]:
        left, done = deque(missing), SimpleQueue[tuple[_Place, float | BaseException]]()
        found: dict[_Place, float] = {}
        self._is_left.clear()
        with connected(self.options, self._pace) as client:

            def ask() -> None:
                with suppress(IndexError):
                    while True:
                        place = left.popleft()
                        try:
                            done.put((place, self._ask_once(client, place, missing[place])))
                        except BaseException as exc:
                            done.put((place, exc))

            self._client = client
            # daemons, unlike those of an executor, do not keep a process from ending that was told twice to end
            n_threads = min(self.options.concurrency, len(missing))
            threads = [threading.Thread(target=ask, name="judge", daemon=True) for _ in range(n_threads)]
            for thread in threads:
                thread.start()
            try:
                while len(found) < len(missing):
                    place, outcome = self._next(done)
                    if isinstance(outcome, BaseException):
                        raise outcome
                    found[place] = outcome
            except BaseException:
                client.stopped.set()
                left.clear()
                self._wait(threads)
                raise
        return found

    def _next(self, done: SimpleQueue[tuple[_Place, float | BaseException]]) -> tuple[_Place, float | BaseException]:
        while not self._is_left.is_set():
            with suppress(Empty):
                return done.get(timeout=_PAUSE_S)
        raise JudgeError("judge: must be asked to the end, got an end before; run the study again")

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        """Wait for the questions that are open, so that no reply that costs something is lost; see :meth:`leave`."""
        speaks_at = time.monotonic() + _SILENT_S
        while not self._is_left.is_set() and (n_open := sum(thread.is_alive() for thread in threads)):
            time.sleep(_PAUSE_S)
            if time.monotonic() >= speaks_at:
                speaks_at = math.inf
                _LOG.warning(
                    "waiting for the judge's replies to %d open questions, up to %g s; interrupt again to leave them",
                    n_open,
                    self.options.timeout,
                )

    def _ask_once(self, client: JudgeClient, place: _Place, question: Question) -> float:
        """Ask, unless another process does so at this moment: then take the score that it gets."""
        if client.stopped.is_set():
            raise JudgeError("judge: must be asked to the end, got an end before; run the study again")
        with self._store.alone(*place, client.stopped):
            known = self._store.scores([place[0]])
            return known[place] if place in known else self._ask(client, place, question)

    def _ask(self, client: JudgeClient, place: _Place, question: Question) -> float:
        key, number = place
        messages: tuple[Message, ...] = question.messages
        fault = ""
        for _ in range(_TRIES):
            self._open_question()
            try:
                reply = client.reply(messages, number)
            except BaseException:
                with self._lock:
                    self._n_open -= 1
                raise
            score, fault = _read(question, reply)
            with self._lock:  # a question is either open or has a reply, for those who count both
                self._n_open -= 1
                self._store.add(key, number, score, n_in=reply.n_in, n_out=reply.n_out, reply=reply.text)
            if score is not None:
                return score
            messages = (*question.messages, ("assistant", reply.text), ("user", f"Reply again: {fault}."))
        raise JudgementError(
            f"judge {self.options.model}: must give a score, but {_TRIES} times {fault}; correct the rubric or choose"
            " another judge"
        )

    def _open_question(self) -> None:
        """Count a question as open.

        Raises:
            JudgeBudgetError: If its reply could exceed the budget.
        """
        budget = self.options.budget
        with self._lock:
            if budget is not None:
                cost = self._store.cost()
                n_replies = 0 if cost is None else cost.n_replies
                if n_replies + self._n_open >= budget:
                    raise JudgeBudgetError(
                        f"judge.budget must leave questions to ask, got {budget}, of which {n_replies} are used; raise"
                        " it to go on: the study keeps what was judged"
                    )
            self._n_open += 1

    def _key(self, question: Question) -> str:
        options = self.options
        content = [options.model, options.temperature, options.max_tokens, question.messages]
        content += [question.lowest, question.highest]
        content += [options.extra_body] if options.extra_body else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(question: Question, reply: Reply) -> tuple[float | None, str]:
    """The score of a reply, or None and what is wrong with it."""
    try:
        return question.read(reply.text), ""
    except ValueError as exc:
        return None, str(exc)
