"""The expected score of a chunk, and its gradient: what a search climbs instead of the score.

    score           sum over terms of weight x metric          of the answers that the model gives
    expected score  sum over terms of weight x stand-in        of the probabilities that it gives them

Terms, groups and weights are those of the score; only the metrics have stand-ins (``stand_ins.py``, ``targets.py``). A
metric that has none is left out of the expected score. The pass that differentiates also answers the requests of the
chunk, all but those that are answered by a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from optuna_merge.evaluation.engine import DifferentiableEngine, Prepared, Request, Response, Sink
from optuna_merge.evaluation.leaf import Leaf
from optuna_merge.evaluation.quiet import quietly
from optuna_merge.evaluation.results import Documents
from optuna_merge.evaluation.stand_ins import Array, StandIn
from optuna_merge.evaluation.targets import Targets
from optuna_merge.evaluation.term import Term

_N_PROBED = 8


@dataclass(frozen=True)
class Part:
    """The stand-in of one leaf of one term.

    Attributes:
        term: Key of the term.
        weight: The term's weight.
        coefficient: What the leaf's metric counts for in the term's.
        stand_in: The leaf's expected metric.
    """

    term: str
    weight: float
    coefficient: float
    stand_in: StandIn


class ExpectedScore:
    """A weighted sum of stand-ins as a function of log-likelihoods; a ``Goal``."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Add stand-ins up."""
        self._parts = parts
        self.together = [group for part in parts for group in part.stand_in.together]

    def tasks(self, log_likelihoods: Array) -> dict[str, float]:
        """Key of each term that has a stand-in to its expected metric."""
        tasks: dict[str, float] = {}
        for part in self._parts:
            value = part.coefficient * part.stand_in.value(log_likelihoods)
            tasks[part.term] = tasks.get(part.term, 0.0) + value
        return tasks

    def value(self, log_likelihoods: Array) -> float:
        """The expected score."""
        return sum(p.weight * p.coefficient * p.stand_in.value(log_likelihoods) for p in self._parts)

    def gradient(self, log_likelihoods: Array) -> Array:
        """Its derivative by each log-likelihood; see ``Goal.gradient``."""
        gradient = np.zeros_like(log_likelihoods)
        for part in self._parts:
            gradient += part.weight * part.coefficient * part.stand_in.gradient(log_likelihoods)
        return gradient


class ExpectedChunk:
    """Documents whose expected score is differentiated in one pass.

    Attributes:
        goal: The expected score, as a function of the log-likelihoods that the pass finds.
    """

    def __init__(
        self,
        engine: DifferentiableEngine,
        terms: Sequence[Term],
        parts: Sequence[tuple[Leaf, list[int]]],
        prepared: Prepared,
        *,
        uses_chat_template: bool,
    ) -> None:
        """Find the right answers of the documents and prepare the requests.

        Args:
            engine: Answers and differentiates.
            terms: What is scored.
            parts: Each leaf that has documents here, and their numbers.
            prepared: The requests of these documents, as they are prepared for scoring.
            uses_chat_template: Whether prompts were rendered with the chat template.

        Raises:
            TaskError: If the code of a task's ``gradient_target`` raises.
            EngineError: If the engine cannot answer a request.
        """
        self._engine = engine
        self._parts = parts
        self._generated: list[Request] = []
        requests: list[Request] = []
        # where the response to each request of a leaf will be: whether among the generated ones, and its number
        self._places: dict[str, list[tuple[bool, int]]] = {leaf.name: [] for leaf, _ in parts}
        numbers: dict[str, dict[int, list[int]]] = {leaf.name: {} for leaf, _ in parts}
        for leaf, doc_ids in parts:
            for doc_id in doc_ids:
                own = numbers[leaf.name].setdefault(doc_id, [])
                for instance in leaf.instances[doc_id]:
                    generates = instance.request_type == "generate_until"
                    into = self._generated if generates else requests
                    own += [] if generates else [len(into)]
                    for _ in range(instance.repeats or 1):
                        self._places[leaf.name].append((generates, len(into)))
                        into.append(instance)
        targets = Targets(engine.eot_text, uses_chat_template, len(requests))
        with quietly():
            self.goal = ExpectedScore(list(_parts(terms, parts, targets, numbers)))
        is_same = not targets.requests and not self._generated and prepared.n_requests == len(requests)
        self._prepared: Prepared = prepared if is_same else engine.prepare([*requests, *targets.requests])
        self._prepared_texts: Prepared | None = None

    def value(self) -> float:
        """The expected score of the weights that the engine holds, without its gradient."""
        return self.goal.value(_log_likelihoods(self._engine.respond(self._prepared)))

    def differentiate(self, sink: Sink, *, generate: bool) -> tuple[Array, Documents | None]:
        """Differentiate the expected score by the weights that the engine holds.

        Args:
            sink: Takes the gradients; see ``DifferentiableEngine.respond_with_gradient``.
            generate: Whether to generate the texts that scoring needs, which the gradient does not.

        Returns:
            Log-likelihoods, of which :attr:`goal` is a function, and the document values as scoring finds them; None if
            texts were needed for them and not generated.
        """
        responses = self._engine.respond_with_gradient(self._prepared, self.goal, sink)
        log_likelihoods = _log_likelihoods(responses)
        if self._generated and not generate:
            return log_likelihoods, None
        return log_likelihoods, self._documents(responses, self._texts())

    def _texts(self) -> list[Response]:
        if not self._generated:
            return []
        if self._prepared_texts is None:
            self._prepared_texts = self._engine.prepare(self._generated)
        return self._engine.respond(self._prepared_texts)

    def _documents(self, responses: Sequence[Response], texts: Sequence[Response]) -> Documents:
        def found(leaf: Leaf) -> list[Response]:
            return [(texts if generated else responses)[number] for generated, number in self._places[leaf.name]]

        with quietly():
            return {leaf.name: leaf.score(doc_ids, iter(found(leaf))) for leaf, doc_ids in self._parts}


def _log_likelihoods(responses: Sequence[Response]) -> Array:
    return np.array([r[0] if isinstance(r, tuple) else r for r in responses], dtype=np.float64)


def has_stand_in(term: Term, eos: str, uses_chat_template: bool) -> bool:
    """Whether the metric of a term has a stand-in for any leaf, judged by the first documents that are searched.

    Args:
        term: The term.
        eos: Text of the end-of-sequence token.
        uses_chat_template: Whether prompts were rendered with the chat template.

    Raises:
        TaskError: If the code of a task's ``gradient_target`` raises.
    """
    parts = [(leaf, leaf.searched[:_N_PROBED]) for leaf in term.leaves if leaf.searched]
    numbers = {leaf.name: {d: list(range(len(leaf.instances[d]))) for d in doc_ids} for leaf, doc_ids in parts}
    return any(_parts([term], parts, Targets(eos, uses_chat_template, 0), numbers))


def _parts(
    terms: Sequence[Term],
    parts: Sequence[tuple[Leaf, list[int]]],
    targets: Targets,
    numbers: dict[str, dict[int, list[int]]],
) -> Iterator[Part]:
    here = {leaf.name: doc_ids for leaf, doc_ids in parts}
    for term in terms:
        metric, filter_name = term.metric_and_filter
        leaves = [leaf for leaf in term.leaves if leaf.name in here and (metric, filter_name) in leaf.wanted]
        coefficients = term.coefficients({leaf.name: len(here[leaf.name]) for leaf in leaves})
        for leaf in leaves:
            stand_in = targets.find(leaf, metric, filter_name, here[leaf.name], numbers[leaf.name])
            if stand_in is not None:
                yield Part(term.key, term.weight, coefficients[leaf.name], stand_in)
