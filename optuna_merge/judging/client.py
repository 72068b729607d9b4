"""The judge's server, asked over the OpenAI-compatible interface: it is waited for while it is away, and never rushed.

Knows HTTP and what its errors mean. It does not know rubrics nor scores. The key goes into one request header and
nowhere else: it is taken out of whatever a server sends back before anybody sees it.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import tenacity

from optuna_merge.config.judge import JudgeConfig
from optuna_merge.errors import JudgeError, JudgementError
from optuna_merge.judging.rubric import Message

_TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which the same request may succeed."""

_LONGEST_PAUSE_S = 30.0
_SILENT_S = 5.0
"""For how long a judge may be away before a line says so."""
_NEXT_LINE_S = 60.0

_LOG = logging.getLogger(__name__)
"""Writes to stderr, unless the program that uses this package sets up logging otherwise."""

_SHOWN = 200
"""Characters of a server's message that an error shows."""


@dataclass(frozen=True)
class Reply:
    """What a judge replied.

    Attributes:
        text: What it said.
        n_in, n_out: Tokens of question and reply; 0 if the server does not count them.
    """

    text: str
    n_in: int
    n_out: int


class Pace:
    """Lets requests begin at a bounded rate.

    Args:
        per_minute: Requests a minute at most; None: no bound.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        """Wait for the next turn, or until ``stopped`` is set."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        if turn > now:
            stopped.wait(turn - now)


class JudgeClient:
    """A connection to the judge, for several threads.

    Attributes:
        stopped: Ends all waiting once it is set.
    """

    def __init__(self, http: httpx2.Client, options: JudgeConfig, key: str, pace: Pace) -> None:
        self._http = http
        self._options = options
        self._key = key
        self._pace = pace
        self._said_at = -math.inf
        self.stopped = threading.Event()

    def reply(self, messages: Sequence[Message], seed: int) -> Reply:
        """Ask for the next message of a chat, and wait while the judge is away.

        Args:
            messages: The chat.
            seed: Tells judgements of one question apart, for a temperature above 0.

        Raises:
            JudgeError: If the judge stays away, or refuses the key or the model.
            JudgementError: If it refuses this chat.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AwayError),
            wait=_pause_s,
            stop=tenacity.stop_after_delay(self._options.patience) | tenacity.stop_when_event_set(self.stopped),
            sleep=tenacity.sleep_using_event(self.stopped),
            before_sleep=self._say_it_is_away,
            reraise=True,
        )
        options = self._options
        body = {
            "model": options.model,
            "messages": [{"role": role, "content": content} for role, content in messages],
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": seed,
            **options.extra_body,
        }
        try:
            return retrying(self._complete, body)
        except _AwayError as exc:
            raise JudgeError(
                f"judge.url must be where a judge answers, got {options.url}: {exc} for {options.patience:g} s;"
                " start it and run the study again: it goes on where it is"
            ) from exc

    def refusal(self, extra_body: Mapping[str, Any]) -> str:
        """Why the server does not reply with one token as the model that is asked for; empty if it does.

        Args:
            extra_body: Added to the request.

        Raises:
            JudgeError: If the server refuses the key, or cannot be reached; with ``extra_body``, which makes some
                servers stumble, the latter is a refusal, too.
        """
        messages = [{"role": "user", "content": "Hello."}]
        body = {"model": self._options.model, "messages": messages, "max_tokens": 1, **extra_body}
        try:
            self._send("POST", "/chat/completions", json=body)
        except JudgementError as exc:
            return str(exc)
        except _AwayError as exc:
            if extra_body:
                return str(exc)
            raise JudgeError(
                f"judge.url {self._options.url} must answer a question, got {exc}; see the server"
            ) from exc
        return ""

    def models(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
            JudgeError: If it cannot be reached, refuses the key, or is no such server.
        """
        url = self._options.url
        try:
            response = self._send("GET", "/models")
            return [str(model["id"]) for model in response.json()["data"]]
        except _AwayError as exc:
            fault: Exception = exc
        except JudgementError as exc:
            fault = exc
        except (ValueError, KeyError, TypeError) as exc:
            fault = ValueError(f"no list of models at {url}/models")
            fault.__cause__ = exc
        raise JudgeError(
            f"judge.url must be where a judge answers, got {url}: {fault}; start the server or correct the URL, which"
            " usually ends with /v1"
        ) from fault

    def _send(self, method: str, path: str, **content: Any) -> httpx2.Response:
        self._pace.wait(self.stopped)
        try:
            response = self._request(method, f"{self._options.url}{path}", content)
        except (httpx2.TransportError, httpx2.DecodingError) as exc:
            raise _AwayError(self._shown(str(exc) or type(exc).__name__)) from exc
        status = response.status_code
        said = self._shown(f"{status} {response.reason_phrase} {response.text}")
        if status >= 500 or status in _TRANSIENT:
            raise _AwayError(said, _seconds(response.headers.get("retry-after")))
        if status in (401, 403):
            how = f"the key in {self._options.key_variable}" if self._key else "no key; set judge.key_variable"
            raise JudgeError(f"judge.url {self._options.url} must accept the key, got '{said}' for {how}")
        if not response.is_success:
            raise JudgementError(f"judge {self._options.model}: must accept the request, got '{said}'")
        return response

    def _request(self, method: str, url: str, content: Mapping[str, Any]) -> httpx2.Response:
        """The whole response. The timeout also ends one that comes in drops, by which a server keeps a connection."""
        deadline = time.monotonic() + self._options.timeout
        parts = []
        with self._http.stream(method, url, **content) as response:
            for part in response.iter_raw():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("timed out")
        return httpx2.Response(response.status_code, headers=response.headers, content=b"".join(parts))

    def _say_it_is_away(self, state: tenacity.RetryCallState) -> None:
        """Write a line on stderr about a judge that is waited for, unless it is back in a moment; one a minute."""
        pause = 0.0 if state.next_action is None else state.next_action.sleep
        exc = None if state.outcome is None else state.outcome.exception()
        now = time.monotonic()
        if (state.seconds_since_start or 0.0) + pause >= _SILENT_S and now >= self._said_at + _NEXT_LINE_S:
            self._said_at = now
            _LOG.warning(
                "the judge at %s is away: %s; waiting for it, up to %g s",
                self._options.url,
                exc,
                self._options.patience,
            )

    def _complete(self, body: dict[str, Any]) -> Reply:
        response = self._send("POST", "/chat/completions", json=body)
        try:
            data = response.json()
            text = str(data["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as exc:
            raise _AwayError(self._shown(f"no whole reply, but '{response.text}'")) from exc
        usage = data.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        n_in, n_out = (count if isinstance(count, int) else 0 for count in counts)
        return Reply(self._without_key(text), n_in, n_out)

    def _shown(self, text: str) -> str:
        return " ".join(self._without_key(text).split())[:_SHOWN]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _AwayError(Exception):
    """The judge does not answer now, but may later; ``after_s`` is when it says so itself."""

    def __init__(self, reason: str, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.after_s = after_s


@contextmanager
def connected(options: JudgeConfig, pace: Pace) -> Iterator[JudgeClient]:
    """Open connections to the judge; they are closed at the end.

    Raises:
        JudgeError: If the key is missing.
    """
    key = _key(options)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(headers=headers, timeout=options.timeout) as http:
        yield JudgeClient(http, options, key, pace)


def check_judge(options: JudgeConfig) -> None:
    """Ask the server for its models, so that a wrong set-up is seen before the first merge.

    A server may have a model that it does not list, as transformers' own has one from a folder. Then it is asked for a
    reply of one token, which counts for nothing. So it is asked with ``extra_body``, too.

    Raises:
        JudgeError: If the key is missing or refused, there is no such server, it lacks the model, or refuses
            ``extra_body``.
    """
    with connected(options, Pace(None)) as client:
        models = client.models()
        has_model = options.model in models or not client.refusal({})
        refusal = client.refusal(options.extra_body) if has_model and options.extra_body else ""
    if not has_model:
        raise JudgeError(
            f"judge.model must be one that {options.url} has ({', '.join(models) or 'none'}), got '{options.model}';"
            " correct it"
        )
    if refusal:
        raise JudgeError(
            f"judge.extra_body must be what {options.url} takes, got {refusal}; correct it, or see the server"
        )


def _key(options: JudgeConfig) -> str:
    """The judge's key; empty if none is sent.

    Raises:
        JudgeError: If its environment variable is not set.
    """
    key = os.environ.get(options.key_variable, "") if options.key_variable else ""
    if options.key_variable and not key:
        raise JudgeError(
            f"judge.key_variable must name an environment variable that is set, got {options.key_variable}, which is"
            " not set; export it, or leave key_variable out if the judge takes no key"
        )
    return key


def _pause_s(state: tenacity.RetryCallState) -> float:
    exc = state.outcome.exception() if state.outcome is not None else None
    if isinstance(exc, _AwayError) and exc.after_s is not None:
        return exc.after_s
    return tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S)(state)


def _seconds(retry_after: str | None) -> float | None:
    """What ``Retry-After`` says, if it says a number; dates are left to the usual pauses."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None
