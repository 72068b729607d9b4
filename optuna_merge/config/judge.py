"""The section ``judge``: the stronger model that judges the answers of judged tasks.

Knows how it is reached and what it may cost; opens no connection.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from optuna_merge.config.section import Section

BEST_SOURCE = "best_source"

_OWN = frozenset({"model", "messages", "max_tokens", "temperature", "seed", "stream", "n"})
"""What a request says anyway, and what would change the form of a reply."""


class JudgeConfig(Section):
    """A judge behind an OpenAI-compatible HTTP interface.

    Attributes:
        url: Of the interface, such as ``http://127.0.0.1:8000/v1``. Questions and answers are sent there.
        model: As the server names it.
        key_variable: Environment variable that holds the key; empty: no key is sent.
        concurrency: Questions that are open at the same time, in all workers together.
        requests_per_minute: Requests in a minute at most, in all workers together; None: no bound.
        timeout: Seconds after which an unanswered request is sent again.
        patience: Seconds for which a judge that is away is waited for.
        max_tokens: Tokens of a reply at most.
        temperature: Of the judge's replies.
        n_judgements: How often each answer is judged; its score is the mean.
        budget: Replies that the study may take in all; None: any number.
        against: With whose answers pairwise tasks compare where their documents have none: one of the study's models,
            or ``best_source``, which None means, too.
        extra_body: Added to each request, for what one server takes beyond the interface; part of the study.
    """

    url: str
    model: str = Field(min_length=1)
    key_variable: str = ""
    concurrency: int = Field(8, ge=1, le=256)
    requests_per_minute: float | None = Field(None, gt=0)
    timeout: float = Field(60, gt=0)
    patience: float = Field(1800, gt=0)
    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(0, ge=0)
    n_judgements: int = Field(1, ge=1)
    budget: int | None = Field(None, ge=1)
    against: str | None = Field(None, min_length=1)
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @field_validator("extra_body")
    @classmethod
    def _extra_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(_OWN & value.keys()):
            raise ValueError(f"options without {own[0]}, which the study itself sets")
        return value

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("a URL such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError("a URL without a password; name an environment variable in key_variable")
        return value.rstrip("/")
