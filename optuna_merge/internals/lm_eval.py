"""lm-eval's internals that we use; no other file reaches past its public interface.

Public, and used directly elsewhere: ``TaskManager``, ``Task``, ``ConfigurableTask`` and ``Group`` with their methods,
``Instance``, the registered metric ``mean``, and the public methods of ``HFLM``. ``tests/internals/test_lm_eval.py``
names what broke when lm-eval changes. Knows nothing of scores or engines.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lm_eval.api.task
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr, stderr_for_metric
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.utils import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from optuna_merge.errors import TaskError

__all__ = [
    "DEFAULT_OTHER_SEED",
    "DEFAULT_RANDOM_SEED",
    "Loading",
    "Rendering",
    "TooFewExamplesError",
    "apply_filters",
    "encode_pair",
    "filter_fallbacks",
    "filter_functions",
    "filter_names",
    "filtered_before",
    "get_rolling_token_windows",
    "get_sample_size",
    "handle_stop_sequences",
    "is_multimodal",
    "make_disjoint_window",
    "maybe_truncate",
    "mean_stderr",
    "normalize_gen_kwargs",
    "postprocess_generated_text",
    "read_task_file",
    "runs_generated_code",
    "stderr_for_metric",
    "stop_lookback",
    "take_instances",
    "watch_loading",
    "watch_rendering",
    "without_progress_bar",
]


class TooFewExamplesError(Exception):
    """A task asks for more few-shot examples than there are.

    Attributes:
        n_available: Documents that could be examples.
        asked_excluded: Whether the document that is asked was left out of them.
    """

    def __init__(self, n_available: int, asked_excluded: bool) -> None:
        super().__init__(f"only {n_available} few-shot examples are available")
        self.n_available = n_available
        self.asked_excluded = asked_excluded


@dataclass
class Rendering:
    """How far a task has rendered its requests.

    Attributes:
        doc_id: The document that is being rendered; None before the first.
        n_done: Documents whose requests are complete.
    """

    doc_id: int | None = None
    n_done: int = 0


@dataclass
class Loading:
    """How far lm-eval got with a task that could not be loaded.

    Attributes:
        has_no_documents: Whether the evaluated split is empty.
        reached_documents: Whether lm-eval had begun to render the first document.
    """

    has_no_documents: bool = False
    reached_documents: bool = False


@contextlib.contextmanager
def watch_rendering(task: Task) -> Iterator[Rendering]:
    """Follow ``task.build_all_requests``, which does not say which document it failed on.

    While the context is open, the task's own methods count documents. lm-eval calls ``doc_to_prefix``,
    ``fewshot_context`` and ``construct_requests`` once for each, in order.

    Raises:
        TooFewExamplesError: From within ``build_all_requests``, if the few-shot sampler has too few documents.
    """
    rendering = Rendering()

    def begin(function: Callable[..., Any]) -> Callable[..., Any]:
        def begun(*args: Any, **kwargs: Any) -> Any:
            rendering.doc_id = rendering.n_done
            return function(*args, **kwargs)

        return begun

    def finish(function: Callable[..., Any]) -> Callable[..., Any]:
        def finished(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            rendering.n_done += 1
            return result

        return finished

    with contextlib.ExitStack() as stack:
        for name in ("doc_to_prefix", "fewshot_context"):
            stack.enter_context(_replaced(task, name, begin(getattr(task, name))))
        stack.enter_context(_replaced(task, "construct_requests", finish(task.construct_requests)))
        sampler = getattr(task, "sampler", None)  # a task that is written in Python need not have one
        if sampler is not None:
            stack.enter_context(_replaced(sampler, "sample", _refusing_too_many(sampler)))
        yield rendering


@contextlib.contextmanager
def watch_loading() -> Iterator[Loading]:
    """Follow ``TaskManager.load``, which renders a task's first document and gives no task if that fails."""
    loading = Loading()
    original = ConfigurableTask.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except Exception:
            documents = getattr(self, "task_docs", None)
            loading.has_no_documents = documents is not None and len(documents) == 0
            loading.reached_documents = hasattr(self, "multiple_target")  # set right before the first is rendered
            raise

    with _replaced(ConfigurableTask, "__init__", init):
        yield loading


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Let ``build_all_requests`` draw no bar; it has no switch for it."""
    with _replaced(lm_eval.api.task, "tqdm", lambda items, **_: items):
        yield


def take_instances(task: Task) -> list[Instance]:
    """Take the requests that a task has built out of it."""
    instances = task.instances
    _set_instances(task, None)
    return cast("list[Instance]", instances)


def apply_filters(task: Task, instances: Sequence[Instance]) -> None:
    """Run a task's filters, which fill ``filtered_resps`` of answered requests."""
    _set_instances(task, list(instances))
    try:
        task.apply_filters()
    finally:
        _set_instances(task, None)


def filter_names(task: Task) -> list[str]:
    """Names of a task's filters, in order.

    Raises:
        TaskError: If this version of lm-eval keeps filters elsewhere.
    """
    try:
        return [ensemble.name for ensemble in task._filters]
    except AttributeError as exc:
        raise _changed(f"{type(task).__name__}._filters") from exc


def filter_fallbacks(task: Task, name: str) -> list[Any]:
    """What a task's filter gives for a text in which it finds nothing; empty if none of its steps says so."""
    fallbacks: list[Any] = []
    for ensemble in task._filters:
        for make_step in ensemble.filters if ensemble.name == name else ():
            fallback = getattr(make_step(), "fallback", [])
            fallbacks += fallback if isinstance(fallback, list) else [fallback]
    return fallbacks


def filter_functions(task: Task) -> list[Any]:
    """The functions of a task's ``custom`` filters."""
    steps = [make_step() for ensemble in task._filters for make_step in ensemble.filters]
    return [step.filter_fn for step in steps if hasattr(step, "filter_fn")]


def filtered_before(task: Task, instances: Sequence[Instance], function: Any) -> list[Any]:
    """What the function of a task's ``custom`` filter is given: the responses after all steps before it."""
    for ensemble in task._filters:
        steps = [make_step() for make_step in ensemble.filters]
        place = next((n for n, step in enumerate(steps) if getattr(step, "filter_fn", None) is function), None)
        if place is not None:
            responses: Any = [instance.resps for instance in instances]
            documents: Any = [instance.doc for instance in instances]
            for step in steps[:place]:
                responses = step.apply(responses, documents)
            return list(responses)
    raise _changed("the function of a custom filter")


def is_multimodal(task: Task) -> bool:
    """Whether a task needs images or audio."""
    # lm-eval sets the attribute on such tasks only
    return bool(getattr(task, "MULTIMODAL", False))


def runs_generated_code(task: Task) -> bool:
    """Whether a task executes what the model generates."""
    # lm-eval sets the attribute on such tasks only
    return bool(getattr(task, "UNSAFE_CODE", False))


def read_task_file(path: Path) -> None:
    """Raise what is wrong with a task file; lm-eval's index silently leaves out a file that it cannot read."""
    load_yaml(path, resolve_func=False)


def encode_pair(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, which is not empty, and of its continuation, as a model of lm-eval splits them."""
    return cast("tuple[list[int], list[int]]", lm._encode_pair(context, continuation))


def stop_lookback(tokenizer: Any, text: str) -> int:
    """How many of the last tokens lm-eval decodes to see whether a text of a Hugging Face model has come to a stop."""
    try:
        return int(MultiTokenEOSCriteria(text, tokenizer, 0, 1).sequence_id_len)
    except (TypeError, AttributeError) as exc:
        raise _changed("MultiTokenEOSCriteria.sequence_id_len") from exc


def _refusing_too_many(sampler: Any) -> Callable[..., Any]:
    original = sampler.sample

    def sample(n: int, eval_doc: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(n, eval_doc, *args, **kwargs)
        except Exception as exc:
            n_available = sum(document != eval_doc for document in sampler.fewshot_docs())
            if n <= n_available:
                raise
            raise TooFewExamplesError(n_available, eval_doc is not None) from exc

    return sample


def _set_instances(task: Task, instances: list[Instance] | None) -> None:
    task._instances = instances
    if task.instances is not instances:
        raise _changed(f"{type(task).__name__}._instances")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner)
    before = own.get(name)
    was_own = name in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _changed(name: str) -> TaskError:
    version = importlib.metadata.version("lm-eval")
    return TaskError(f"lm-eval {version}: {name} must exist, found none; install a version that this package allows")
