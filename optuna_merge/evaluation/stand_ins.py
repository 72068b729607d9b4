"""Differentiable stand-ins for metrics: functions of log-likelihoods that a gradient can climb.

A metric that looks at the likeliest answer is flat almost everywhere. Its stand-in is its expectation, if the answer
were drawn by the model's own probabilities; a log-likelihood or a perplexity is its own stand-in. Knows numbers only;
``targets.py`` finds them for a task.

Every class has :attr:`together`, :meth:`value` and :meth:`gradient`, as in ``StandIn``. Derivatives are written out:
a chunk has thousands of log-likelihoods and is differentiated once for each batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class StandIn(Protocol):
    """A stand-in for one metric of one lm-eval task over some documents.

    Attributes:
        together: Requests whose log-likelihoods belong to one term of a sum.
    """

    @property
    def together(self) -> list[list[int]]: ...  # noqa: D102

    def value(self, log_likelihoods: Array) -> float:
        """The expected metric. ``log_likelihoods``: of all requests, float64, ``[n_requests]``."""
        ...

    def gradient(self, log_likelihoods: Array) -> Array:
        """Its derivative by each log-likelihood, ``[n_requests]``; NaN for those of a term that is not all known."""
        ...


@dataclass(frozen=True)
class Choice:
    """A document that is answered by one of several choices.

    Attributes:
        requests: Number of the request for each choice.
        gains: The metric if the choice is taken.
        scales: What the choice's log-likelihood is multiplied by before choices are compared.
        priors: Request whose log-likelihood is subtracted from the choice's; empty if none is.
    """

    requests: tuple[int, ...]
    gains: tuple[float, ...]
    scales: tuple[float, ...]
    priors: tuple[int, ...] = ()


class MeanChoice:
    """Mean over documents of the metric's expectation, if a choice is drawn by the softmax of scaled likelihoods."""

    def __init__(self, documents: Sequence[Choice], n_documents: int) -> None:
        """Lay the documents out as arrays.

        Args:
            documents: Those whose right answer is known.
            n_documents: All that the mean is over.
        """
        self.together = [[*document.requests, *document.priors] for document in documents]
        self._n_documents = n_documents
        shape = len(documents), max(len(document.requests) for document in documents)
        self._given = np.zeros(shape, dtype=bool)
        self._requests, self._priors = np.zeros(shape, dtype=np.int64), np.full(shape, -1)
        self._gains, self._scales = np.zeros(shape), np.ones(shape)
        for row, document in enumerate(documents):
            n = len(document.requests)
            self._given[row, :n] = True
            self._requests[row, :n], self._gains[row, :n] = document.requests, document.gains
            self._scales[row, :n], self._priors[row, : len(document.priors)] = document.scales, document.priors

    def value(self, log_likelihoods: Array) -> float:  # noqa: D102
        return float((self._probabilities(log_likelihoods) * self._gains).sum()) / self._n_documents

    def gradient(self, log_likelihoods: Array) -> Array:  # noqa: D102
        probabilities = self._probabilities(log_likelihoods)
        expected = (probabilities * self._gains).sum(1, keepdims=True)
        slopes = self._scales * probabilities * (self._gains - expected) / self._n_documents
        gradient = np.zeros_like(log_likelihoods)
        np.add.at(gradient, self._requests[self._given], slopes[self._given])
        has_prior = self._priors >= 0
        np.add.at(gradient, self._priors[has_prior], -slopes[has_prior])
        return gradient

    def _probabilities(self, log_likelihoods: Array) -> Array:
        priors = np.where(self._priors >= 0, log_likelihoods[self._priors], 0.0)
        scores = np.where(self._given, self._scales * (log_likelihoods[self._requests] - priors), -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Text:
    """A document that is answered by a text.

    Attributes:
        requests: Numbers of requests for the right text, one for each way in which it may end.
        right: The metric if the text is given.
        wrong: The metric otherwise.
    """

    requests: tuple[int, ...]
    right: float
    wrong: float


class MeanText:
    """Mean over documents of the metric's expectation, if a text is drawn by its probability."""

    def __init__(self, documents: Sequence[Text], n_documents: int) -> None:
        """Lay the documents out as arrays; see :class:`MeanChoice`."""
        self.together = [list(document.requests) for document in documents]
        self._n_documents = n_documents
        self._requests = np.concatenate([document.requests for document in documents]).astype(np.int64)
        self._gains = np.repeat([d.right - d.wrong for d in documents], [len(d.requests) for d in documents])
        self._wrong = sum(document.wrong for document in documents)

    def value(self, log_likelihoods: Array) -> float:  # noqa: D102
        gained = float((self._gains * np.exp(log_likelihoods[self._requests])).sum())
        return (self._wrong + gained) / self._n_documents

    def gradient(self, log_likelihoods: Array) -> Array:  # noqa: D102
        gradient = np.zeros_like(log_likelihoods)
        slopes = self._gains * np.exp(log_likelihoods[self._requests]) / self._n_documents
        np.add.at(gradient, self._requests, slopes)
        return gradient


class Likelihood:
    """A function of the sum of log-likelihoods over the size of the texts, which is the metric itself."""

    def __init__(
        self,
        requests: Sequence[int],
        size: float,
        kind: Literal["mean", "perplexity", "bits"],
    ) -> None:
        """Remember whose likelihoods count.

        Args:
            requests: Numbers of the requests.
            size: What their sum is divided by: documents, words or bytes.
            kind: The mean itself, ``exp(-mean)``, or ``-mean / ln 2``.
        """
        self._requests = list(requests)
        self._size = size
        self._kind = kind
        # a perplexity needs all of them; the others are sums
        self.together = [self._requests] if kind == "perplexity" else [[request] for request in requests]

    def value(self, log_likelihoods: Array) -> float:  # noqa: D102
        mean = float(log_likelihoods[self._requests].sum()) / self._size
        if self._kind == "perplexity":
            return float(np.exp(-mean))
        return mean if self._kind == "mean" else -mean / math.log(2)

    def gradient(self, log_likelihoods: Array) -> Array:  # noqa: D102
        gradient = np.zeros_like(log_likelihoods)
        slope = 1.0 if self._kind == "mean" else -1 / math.log(2)
        if self._kind == "perplexity":
            slope = -self.value(log_likelihoods)
        np.add.at(gradient, self._requests, slope / self._size)
        return gradient
