"""The requests of one lm-eval task: rendered once, by lm-eval's own code, kept document by document.

Knows what can go wrong while a task renders. It does not know how requests are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from optuna_merge.errors import TaskError
from optuna_merge.evaluation.engine import Engine
from optuna_merge.evaluation.faults import fault
from optuna_merge.internals.lm_eval import TooFewExamplesError, take_instances, watch_rendering


def render(name: str, task: Task, selected: Sequence[int], **options: Any) -> dict[int, list[Instance]]:
    """Build the requests of some documents.

    Args:
        name: Name of the task.
        task: The task; it remembers how it rendered these documents.
        selected: Numbers of the documents, in ascending order; at least one.
        **options: Further options of ``Task.build_all_requests``, such as the chat template.

    Returns:
        Document to its requests, in lm-eval's order.

    Raises:
        TaskError: If the task's code raises, or asks for more few-shot examples than there are.
    """
    # The state of the few-shot draw moves on from document to document, so a subset has the prompts of the full run
    # only if every document before it is rendered too.
    with watch_rendering(task) as rendering:
        try:
            task.build_all_requests(limit=selected[-1] + 1, **options)
        except TooFewExamplesError as exc:
            raise _too_few_examples(name, task, exc) from exc
        except Exception as exc:
            raise fault(name, rendering.doc_id, "rendering its request", exc) from exc
    wanted = set(selected)
    requests: dict[int, list[Instance]] = {}
    for instance in take_instances(task):
        if instance.doc_id in wanted:
            requests.setdefault(instance.doc_id, []).append(instance)
    for instances in requests.values():
        instances.sort(key=lambda instance: instance.idx)
    _remember_documents(task, [instances[0].doc for instances in requests.values()])
    return requests


def choose_chat_template(engine: Engine, wanted: bool | None) -> tuple[bool, str]:
    """Whether prompts go through the chat template, and why in words.

    Raises:
        TaskError: If it is wanted and there is none.
    """
    if wanted and not engine.has_chat_template:
        raise TaskError(
            "apply_chat_template must be false or left out, got true: the tokenizer has no chat template; remove it"
        )
    if wanted is not None:
        return wanted, "applied, as asked" if wanted else "not applied, as asked"
    if engine.has_chat_template:
        return True, "applied: the tokenizer has one"
    return False, "not applied: the tokenizer has none"


def rendering_options(engine: Engine, uses_template: bool, fewshot_as_multiturn: bool) -> dict[str, Any]:
    """Options of lm-eval's ``build_all_requests``."""
    return {
        "apply_chat_template": uses_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "chat_template": engine.apply_chat_template if uses_template else None,
        "tokenizer_name": engine.tokenizer_name if uses_template else "",
    }


def _too_few_examples(name: str, task: Task, exc: TooFewExamplesError) -> TaskError:
    others = " besides the one that is asked" if exc.asked_excluded else ""
    return TaskError(
        f"task '{name}': num_fewshot must be at most {exc.n_available}, the documents for examples{others}, got"
        f" {task.get_config('num_fewshot')}; lower it"
    )


def _remember_documents(task: Task, documents: Sequence[Any]) -> None:
    """Let a task render each document's target, text and choices once, instead of once for every trial.

    lm-eval compiles a template for each of these calls, which costs more than a small model's forward pass.
    """
    if not isinstance(task, ConfigurableTask):
        return
    known = {id(document) for document in documents}
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        setattr(task, name, _remembering(getattr(task, name), known))


def _remembering(function: Callable[..., Any], known: set[int]) -> Callable[..., Any]:
    results: dict[int, Any] = {}

    def remembered(doc: Any, *args: Any) -> Any:
        if args or id(doc) not in known:
            return function(doc, *args)
        if id(doc) not in results:
            results[id(doc)] = function(doc)
        return results[id(doc)]

    return remembered
