"""What a person reads of a document: its question, its right answer, and what a model answered.

Knows how tasks state questions and choices. It does not know scores, nor where answers are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from optuna_merge.evaluation.choices import MUTUAL_INFORMATION, choices_of, taken
from optuna_merge.evaluation.engine import Response

ANSWER = "answer"
"""Column of document values that holds what a model answered: a list of texts for each document."""


def question(task: Task, instances: Sequence[Instance]) -> str:
    """What a document asks; the whole prompt, if its task does not state a question apart from it."""
    stated = _stated(task, "doc_to_text", instances[0].doc)
    return stated if isinstance(stated, str) else str(instances[0].args[0])


def shared_question(task: Task, documents: Iterable[Sequence[Instance]]) -> str:
    """What all documents ask, given the requests of each; empty if there are fewer than two, or they differ."""
    first, *others = documents
    text = question(task, first)
    return text if others and all(question(task, other) == text for other in others) else ""


def right_answer(task: Task, document: Any) -> str:
    """What a document should be answered, in words; empty if its task does not say."""
    target = _stated(task, "doc_to_target", document)
    choices = choices_of(task, document)
    found = []
    for part in target if isinstance(target, list | tuple) else [target]:
        is_index = isinstance(part, int) and 0 <= part < len(choices)
        found.append(_lettered(choices, cast("int", part)) if is_index else str(part).strip())
    return "" if target is None else " | ".join(found)


def answers(task: Task, instances: Sequence[Instance], responses: Sequence[Response], metric: str) -> list[str]:
    """What a model answered to a document: its texts, or the choice that it took, or a log-probability.

    Args:
        task: The document's task.
        instances: The document's requests.
        responses: The response to each request, or several for one that is repeated.
        metric: The metric that counts, which says how choices are compared.
    """
    if instances[0].request_type == "generate_until":
        return [str(response) for response in responses]
    likelihoods = [r[0] if isinstance(r, tuple) else float(r) for r in responses]
    choices = choices_of(task, instances[0].doc)
    n_expected = len(choices) * (2 if metric == MUTUAL_INFORMATION else 1)
    if len(choices) > 1 and len(likelihoods) >= n_expected:
        return [_lettered(choices, taken(choices, likelihoods, metric))]
    return [f"log-probability {value:.4f}" for value in likelihoods]


def _lettered(choices: Sequence[str], index: int) -> str:
    """A choice with its letter, unless it is one itself."""
    letter, text = chr(ord("A") + index), choices[index].strip()
    return text if text == letter or index >= 26 else f"{letter}: {text}"


def _stated(task: Task, what: str, document: Any) -> Any:
    """What a task's own code states about a document; None if it cannot."""
    try:
        return getattr(cast("ConfigurableTask", task), what)(document)
    except Exception:
        return None  # only shown: such a document could be rendered and scored all the same
