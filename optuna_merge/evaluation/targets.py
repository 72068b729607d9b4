"""What a task's documents should be answered, as requests whose log-likelihoods a stand-in is computed from.

Which answer is right is found by asking the task's own code what the metric would be if each answer were given. So any
metric has a stand-in that is a number for each document, whatever it is called and however a task computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity
from lm_eval.api.task import ConfigurableTask

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.choices import MUTUAL_INFORMATION, choices_of, lengths
from optuna_merge.evaluation.engine import Request, Response
from optuna_merge.evaluation.faults import fault
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.stand_ins import Choice, Likelihood, MeanChoice, MeanText, StandIn, Text
from optuna_merge.internals.lm_eval import handle_stop_sequences

TARGET_KEY = "gradient_target"
"""Key of a task's ``metadata`` with what a document should be answered, in any form that ``doc_to_target`` may have."""

_LIKELY, _UNLIKELY = -1.0, -1000.0
_KINDS: dict[Any, Literal["mean", "perplexity", "bits"]] = {
    mean: "mean",
    perplexity: "perplexity",
    weighted_perplexity: "perplexity",
    bits_per_byte: "bits",
}
_PAIRS = ("f1", "mcc")
"""Metrics over pairs of the right and the chosen number, which lm-eval aggregates over all documents."""


@dataclass(frozen=True)
class Reference:
    """The right text after a prompt, to be scored; a request."""

    args: tuple[str, str]
    request_type: str = "loglikelihood"


class Targets:
    """Finds the stand-in for a metric of a leaf.

    Attributes:
        requests: Requests that stand-ins need and the leaf does not have.
    """

    def __init__(self, eos: str, uses_chat_template: bool, n_requests: int) -> None:
        """Begin with the requests that are asked anyway.

        Args:
            eos: Text of the end-of-sequence token.
            uses_chat_template: Whether prompts were rendered with the chat template.
            n_requests: How many there are.
        """
        self._eos = eos
        self._uses_chat_template = uses_chat_template
        self._n_before = n_requests
        self._numbers: dict[tuple[str, str], int] = {}
        self.requests: list[Request] = []

    def find(
        self, leaf: Leaf, metric: str, filter_name: str, doc_ids: Sequence[int], numbers: Mapping[int, list[int]]
    ) -> StandIn | None:
        """The stand-in for a metric over some documents; None if it has none.

        Args:
            leaf: The task.
            metric: The metric.
            filter_name: Its filter.
            doc_ids: The documents; at least one.
            numbers: Document to the numbers of its requests that have a log-likelihood.
        """
        if leaf.is_count(metric, filter_name):
            return None
        asked = _Asked(leaf, metric, filter_name)
        first = leaf.instances[doc_ids[0]]
        if first[0].request_type == "generate_until":
            texts = [text for d in doc_ids if asked.is_mean and (text := self._text(asked, d)) is not None]
            return MeanText(texts, len(doc_ids)) if texts else None
        if len(first) > 1:
            choices = [choice for d in doc_ids if (choice := _choice(asked, d, numbers[d])) is not None]
            return MeanChoice(choices, len(doc_ids)) if choices else None
        return _greedy(asked, doc_ids, numbers) or _likelihood(asked, doc_ids, numbers)

    def _text(self, asked: _Asked, doc_id: int) -> Text | None:
        prompt, options = asked.leaf.instances[doc_id][0].args[:2]
        until = options.get("until")
        ends = handle_stop_sequences(list(until) if isinstance(until, list) else until, self._eos)
        wrong = asked.answered(doc_id, "")
        for answer in self._answers(asked, doc_id, prompt):
            # a text ends before the first of its ends
            text = min((answer.split(end)[0] for end in ends if end), key=len, default=answer)
            if not text:
                continue
            right = asked.answered(doc_id, text)
            if asked.is_better(right, wrong):
                gained = float(right), float(wrong)
            elif asked.own_target is not None:
                gained = asked.sign, 0.0
            else:
                continue
            return Text(tuple(dict.fromkeys(self._number(prompt, text + end) for end in ends)), *gained)
        return None

    def _answers(self, asked: _Asked, doc_id: int, prompt: str) -> list[str]:
        """Texts that may be right; those that a prompt's examples would show come first."""
        target = asked.target(doc_id)
        config = asked.leaf.task.config
        delimiter = str(getattr(config, "target_delimiter", " "))
        if self._uses_chat_template and not getattr(config, "gen_prefix", None):
            delimiter = ""
        if prompt[-1:].isspace():
            delimiter = ""
        answers: list[str] = []
        for text in target if isinstance(target, list | tuple) else [target]:
            if text is not None:
                answers += [f"{delimiter}{text}"] if not str(text)[:1].isspace() else []
                answers.append(str(text))
        return list(dict.fromkeys(answers))

    def _number(self, context: str, continuation: str) -> int:
        """Number of the request for a continuation; the same for the same one."""
        key = context, continuation
        if key not in self._numbers:
            self._numbers[key] = self._n_before + len(self.requests)
            self.requests.append(Reference(key))
        return self._numbers[key]


class _Asked:
    """A metric of a leaf whose value can be asked for made-up answers."""

    def __init__(self, leaf: Leaf, metric: str, filter_name: str) -> None:
        self.leaf = leaf
        self.metric = metric
        self._filter_name = filter_name
        metadata = getattr(leaf.task.config, "metadata", None)
        self.own_target = metadata.get(TARGET_KEY) if isinstance(metadata, Mapping) else None
        higher: Mapping[str, Any] = getattr(leaf.task, "higher_is_better", dict)() or {}
        self.sign = -1.0 if higher.get(metric) is False else 1.0

    @property
    def aggregation(self) -> Callable[[Sequence[Any]], float]:
        return self.leaf.aggregation(self.metric)

    @property
    def is_mean(self) -> bool:
        """Whether a mean over documents may stand for the metric."""
        return self.aggregation is mean or self.own_target is not None

    def value(self, doc_id: int, responses: Sequence[Response]) -> Any:
        """The metric of a document whose requests are answered so; None if the task's code cannot say or must not."""
        if self.leaf.runs_elsewhere:
            return None
        instances = self.leaf.instances[doc_id]
        repeated = [r for i, r in zip(instances, responses, strict=True) for _ in range(i.repeats or 1)]
        try:
            return self.leaf.document_value(doc_id, repeated, self.metric, self._filter_name)
        except TaskError:
            return None

    def answered(self, doc_id: int, response: Response) -> Any:
        """The metric of a document whose every request is answered so."""
        return self.value(doc_id, [response] * len(self.leaf.instances[doc_id]))

    def target(self, doc_id: int) -> Any:
        """What the document should be answered: a text or several, or the number of a choice or several."""
        task, doc = cast("ConfigurableTask", self.leaf.task), self.leaf.instances[doc_id][0].doc
        try:
            if self.own_target is not None:
                return task.doc_to_target(doc, self.own_target)
            target = task.doc_to_target(doc)
            if task.config.doc_to_choice is not None and isinstance(target, int):
                return task.doc_to_choice(doc)[target]
        except Exception as exc:
            if self.own_target is not None:
                raise fault(self.leaf.name, doc_id, TARGET_KEY, exc) from exc
            return None
        return target

    def is_better(self, right: Any, wrong: Any) -> bool:
        """Whether the metric tells a right answer from a wrong one."""
        return _is_number(right) and _is_number(wrong) and self.sign * (right - wrong) > 0


def _choice(asked: _Asked, doc_id: int, numbers: Sequence[int]) -> Choice | None:
    """The document's choices, if the metric depends on which of them is taken."""
    # lm-eval then asks for each choice without its context, too
    has_priors = MUTUAL_INFORMATION in asked.leaf.task.aggregation()
    n = len(numbers) // 2 if has_priors else len(numbers)
    if asked.own_target is not None:
        gains = _gains(asked, doc_id, n)
    elif asked.is_mean or asked.metric in _PAIRS:
        others: list[Response] = [(_LIKELY, False)] * (len(numbers) - n)
        taken = [[(_LIKELY, True) if i == j else (_UNLIKELY, False) for j in range(n)] for i in range(n)]
        gains = [_right(asked.metric, asked.value(doc_id, [*responses, *others])) for responses in taken]
    else:
        return None
    if not all(map(_is_number, gains)) or len(set(gains)) == 1:
        return None
    priors = tuple(numbers[n:]) if asked.metric == MUTUAL_INFORMATION else ()
    return Choice(tuple(numbers[:n]), tuple(map(float, gains)), _scales(asked, doc_id, n), priors)


def _gains(asked: _Asked, doc_id: int, n: int) -> list[float]:
    """1 for each choice that the task's own target names, by its number or its text."""
    target = asked.target(doc_id)
    named = target if isinstance(target, list | tuple) else [target]
    choices = _choices(asked, doc_id)
    return [float(i in named or (i < len(choices) and choices[i] in named)) for i in range(n)]


def _scales(asked: _Asked, doc_id: int, n: int) -> tuple[float, ...]:
    """One over the lengths that lm-eval divides by, times their mean: equal lengths give the same as ``acc``."""
    choices = _choices(asked, doc_id)
    if len(choices) != n:
        return (1.0,) * n
    divisors = lengths(choices, asked.metric)
    return tuple(sum(divisors) / n / divisor for divisor in divisors)


def _choices(asked: _Asked, doc_id: int) -> list[str]:
    return choices_of(asked.leaf.task, asked.leaf.instances[doc_id][0].doc)


def _greedy(asked: _Asked, doc_ids: Sequence[int], numbers: Mapping[int, list[int]]) -> StandIn | None:
    """For a metric that asks whether one given text is the likeliest."""
    if asked.aggregation is not mean or asked.leaf.instances[doc_ids[0]][0].request_type != "loglikelihood":
        return None
    texts = []
    for doc_id in doc_ids:
        right, wrong = asked.answered(doc_id, (_LIKELY, True)), asked.answered(doc_id, (_LIKELY, False))
        if _is_number(right) and _is_number(wrong) and right != wrong:
            texts.append(Text(tuple(numbers[doc_id]), float(right), float(wrong)))
    return MeanText(texts, len(doc_ids)) if texts else None


def _likelihood(asked: _Asked, doc_ids: Sequence[int], numbers: Mapping[int, list[int]]) -> StandIn | None:
    """For a metric that is made of log-likelihoods."""
    rolling = asked.leaf.instances[doc_ids[0]][0].request_type == "loglikelihood_rolling"
    size = 0.0
    for doc_id in doc_ids:
        values = [asked.answered(doc_id, ll if rolling else (ll, False)) for ll in (_LIKELY, 2 * _LIKELY)]
        weighted = [value if isinstance(value, tuple | list) else (value, 1) for value in values]
        if [value[0] for value in weighted] != [_LIKELY, 2 * _LIKELY] or len(weighted[0]) != 2:
            return None
        size += float(weighted[0][1])
    kind = _KINDS.get(asked.aggregation)
    return Likelihood([number for d in doc_ids for number in numbers[d]], size, kind) if kind else None


def _right(metric: str, value: Any) -> Any:
    if metric in _PAIRS and isinstance(value, tuple | list) and len(value) == 2:
        gold, taken = value
        return float(taken in gold if isinstance(gold, list) else taken == gold)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and math.isfinite(value)
