"""What a scorer found and will do, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskDescription:
    """What was found for one eval task.

    Attributes:
        name: Key of the term, as in ``Score.tasks``.
        kind: ``task``, ``group`` or ``tag``.
        leaves: The lm-eval tasks that it consists of.
        metric: The metric that counts.
        metrics: All metrics that it has.
        weight: What the metric is multiplied by.
        is_mean: Whether the metric is a mean over documents. If not, a partial score is the metric of the
            documents scored so far.
        more_is_better: Whether the task says that the metric grows with quality; a perplexity does not.
        n_searched: Documents that the search sees.
        n_holdout: Documents that are held out.
    """

    name: str
    kind: str
    leaves: tuple[str, ...]
    metric: str
    metrics: tuple[str, ...]
    weight: float
    is_mean: bool
    more_is_better: bool
    n_searched: int
    n_holdout: int


@dataclass(frozen=True)
class Description:
    """What a scorer will do.

    Attributes:
        tasks: Every term, those of the holdout included.
        n_chunks: Chunks that the searched documents are cut into.
        n_documents: Searched documents.
        n_requests: Requests of one full evaluation.
        n_tokens: Tokens that one full evaluation puts through the model.
        longest: Tokens in the longest input sequence.
        n_padded, n_scored, n_cached: The largest of any chunk; see ``Prepared``.
        n_places: Of one full evaluation; see ``Prepared``.
        choice_cost, text_cost: What one full evaluation costs, in tokens: scoring continuations, with the beginnings
            that are computed once, and generating texts; see ``Prepared``.
        n_judged, n_judged_holdout: Questions that a judge is asked in one full evaluation, searched and held out.
        n_judged_first: Those about one source's answers to the tasks that tell which source is best.
        shared_questions: Eval tasks whose documents all ask the same, each with that question.
        chat_template: Whether prompts go through the tokenizer's chat template.
        chat_template_reason: Why, in words.
    """

    tasks: tuple[TaskDescription, ...]
    n_chunks: int
    n_documents: int
    n_requests: int
    n_tokens: int
    longest: int
    n_padded: int
    n_scored: int
    n_cached: int
    n_places: int
    choice_cost: float
    text_cost: float
    n_judged: int
    n_judged_holdout: int
    n_judged_first: int
    shared_questions: Mapping[str, str]
    chat_template: bool
    chat_template_reason: str
