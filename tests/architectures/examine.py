"""Takes one architecture through everything that a study does with it, and compares each result with transformers.

Models are written, opened, merged by two methods, scored, exported and loaded again. Merged weights are compared with
the same arithmetic on the state dicts that transformers loads, so no tensor name enters the comparison. Scores and
texts are compared with those of lm-eval on the exported model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.errors import OptunaMergeError, first_line
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.merging.export import export
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.testing.conformance import TextRequest
from tests.architectures.tiny import write_models

Status = Literal["works", "refused", "not built", "wrong"]

WEIGHTS = (0.7, 0.4)
TOLERANCE = 1e-3
"""Largest difference of a log-likelihood, and of a merged weight relative to 1."""


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        model_type: As in ``config.json``.
        model_class: The class that transformers builds.
        status: ``wrong`` is a defect of this package.
        reason: Why it does not work.
        notes: How it is scored.
    """

    model_type: str
    model_class: str
    status: Status
    reason: str = ""
    notes: str = ""


class WrongResultError(Exception):
    """A result that differs from that of transformers or lm-eval."""


def examine(model_type: str, folder: Path, *, is_quick: bool = False) -> Outcome:
    """Try one architecture in an empty folder; quickly: by the linear merge alone."""
    step = "building it"
    name = ""
    try:
        with silence():
            paths = write_models(model_type, folder)
            sources = [loaded(path) for path in paths]
            name = type(sources[0]).__name__
    except Exception as exc:
        return Outcome(model_type, name, "not built", said(exc))
    try:
        with silence():
            step = "opening"
            open_all(paths)
            step = "linear"
            notes = merge_linear(paths, sources)
            if not is_quick:
                step = "ties"
                merge_ties(paths, sources)
        return Outcome(model_type, name, "works", notes=notes)
    except OptunaMergeError as exc:
        return Outcome(model_type, name, "refused", first_line(exc).replace(str(folder) + "/", ""))
    except Exception as exc:
        return fault_of_others(paths[0], model_type, name) or Outcome(model_type, name, "wrong", f"{step}: {said(exc)}")


def fault_of_others(folder: Path, model_type: str, name: str) -> Outcome | None:
    """An outcome if lm-eval cannot score the base model either."""
    try:
        with silence():
            by_lm_eval(folder, requests())
    except Exception as exc:
        return Outcome(model_type, name, "not built", f"lm-eval cannot score it: {said(exc)}")
    return None


def open_all(paths: Sequence[Path]) -> None:
    """Every checkpoint can be opened, and tells its layers."""
    for path in paths:
        checkpoint = Checkpoint.open(str(path))
        place_of(checkpoint.names[0], checkpoint.layer_stack)


def merge_linear(paths: Sequence[Path], sources: Sequence[Any]) -> str:
    """A weighted sum of the fine-tunes."""
    return check_merge("linear", {"weight": WEIGHTS}, {"normalize": False}, paths, sources)


def merge_ties(paths: Sequence[Path], sources: Sequence[Any]) -> str:
    """Task vectors with thresholds and elected signs."""
    return check_merge("ties", {"weight": WEIGHTS, "density": (0.5, 0.5)}, {}, paths, sources)


def check_merge(
    method: str,
    per_model: dict[str, tuple[float, ...]],
    options: dict[str, Any],
    paths: Sequence[Path],
    sources: Sequence[Any],
) -> str:
    """Merge, score and export, and compare weights, scores and texts."""
    base, *models = map(str, paths)
    merger = Merger.open([base, *models])
    first = merger.checkpoints[base]
    recipe = Recipe(
        method=method,
        models=tuple(models),
        base_model=base,
        dtype="float32",
        n_layers=first.n_layers,
        groups=(GroupRecipe("all", (0, first.n_layers), ("embedding", "head"), (ParameterSet(per_model=per_model),)),),
        options=options,
    )
    lost = {name for path in paths for name in Checkpoint.open(str(path)).names} - set(merger.names)
    if lost:
        raise WrongResultError(f"{sorted(lost)[0]} is in a source and not in the merge ({len(lost)} in all)")
    engine = HFEngine(base, device="cpu", names=merger.names, batch_tokens=64)
    engine.load_weights(merger.merge(recipe, engine.resident))
    asked = requests() if method == "linear" else requests()[::13]
    engine.expect(asked)
    responses = engine.respond(engine.prepare(asked))
    folder = export(recipe, paths[0].parent / method, merger=merger)
    exported = loaded(folder)
    compare_states("resident model", engine._weights.model.state_dict(), exported.state_dict(), 0)
    if method == "linear":
        compare_states("arithmetic", exported.state_dict(), weighted_sum(sources, exported), TOLERANCE)
    elif untouched := [name for name, tensor in exported.named_parameters() if is_untouched(name, tensor, sources)]:
        raise WrongResultError(f"{untouched[0]} is the base's, not merged ({len(untouched)} in all)")
    way = way_of(engine)
    engine.close()
    compare_responses(responses, by_lm_eval(folder, asked), way)
    return way


def way_of(engine: HFEngine) -> str:
    """What an engine computes the slow way."""
    slow = [
        *(["each continuation in a row of its own"] if engine._shares is False else []),
        *([] if engine._continues else ["common beginnings computed again"]),
        *([] if engine._generator._decodes else ["texts by lm-eval"]),
    ]
    return ", ".join(slow) or "fast"


def weighted_sum(sources: Sequence[Any], exported: Any) -> dict[str, Tensor]:
    """What a linear merge should be, by name of the tensor in transformers."""
    _, *states = [model.state_dict() for model in sources]
    total: dict[str, Tensor] = {}
    for name, tensor in exported.state_dict().items():
        if tensor.is_floating_point():
            both = [state[name].double() for state in states]
            # a few models write over constants, whatever they load
            is_constant = (both[0] == both[1]) & (both[0] == tensor)
            added = sum(weight * one for weight, one in zip(WEIGHTS, both, strict=True))
            total[name] = torch.where(is_constant, both[0], added)
    return total


def is_untouched(name: str, tensor: Tensor, sources: Sequence[Any]) -> bool:
    """Whether a tensor is the base's, although a fine-tune has another."""
    base, model, *_ = [source.state_dict()[name] for source in sources]
    return torch.equal(tensor, base) and not torch.equal(base, model)


def requests() -> list[TextRequest]:
    """Choices behind a long common beginning, a text that is scored, and two that are generated."""
    beginning = (
        "Question: which letter comes next? Answer: A\n\nthe cat sat on the mat and the dog ran after the cat\n\n"
    )
    rests = ("one two three", "the dog", "Question: which letter comes after one two three four five six? Answer:")
    asked = [
        TextRequest("loglikelihood", (beginning + rest, choice))
        for rest in rests
        for choice in (" A", " one two", " seven")
    ]
    asked += [TextRequest("loglikelihood", ("the cat", choice)) for choice in (" sat on", " ran after")]
    asked += [TextRequest("loglikelihood_rolling", (beginning + rests[2],))]
    asked += [
        TextRequest("generate_until", (beginning + rest, {"until": ["\n"], "max_gen_toks": n}))
        for rest, n in zip(rests[1:], (4, 6), strict=True)
    ]
    return asked


def by_lm_eval(folder: Path, asked: Sequence[TextRequest], model: Any = None) -> list[Any]:
    """Responses of lm-eval's own model, or of one that transformers has loaded, one request at a time."""
    given: dict[str, Any] = {"pretrained": str(folder), "device": "cpu", "dtype": "float32"}
    if model is not None:
        given = {"pretrained": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}
    lm = HFLM(**given, backend="causal", batch_size=1, softmax_dtype="float32")
    responses: list[Any] = [None] * len(asked)
    for kind in {request.request_type for request in asked}:
        indices = [i for i, request in enumerate(asked) if request.request_type == kind]
        instances = [Instance(kind, {}, asked[i].args, 0) for i in indices]  # type: ignore[arg-type]
        for i, response in zip(indices, getattr(lm, kind)(instances, disable_tqdm=True), strict=True):
            responses[i] = response
    return responses


def compare_responses(ours: Sequence[Any], theirs: Sequence[Any], way: str) -> None:
    """Raise :class:`WrongResultError` if a response is not lm-eval's."""
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(their, str):
            if our != their:
                raise WrongResultError(f"text {number} is {str(our)!r}, lm-eval generates {their!r} ({way})")
            continue
        (a, our_greedy), (b, greedy) = (pair if isinstance(pair, tuple) else (pair, None) for pair in (our, their))
        if not abs(a - b) <= TOLERANCE * max(1.0, abs(b)):
            raise WrongResultError(f"log-likelihood {number} is {a:.4f}, lm-eval says {b:.4f} ({way})")
        if our_greedy != greedy:
            raise WrongResultError(f"log-likelihood {number} is greedy: {our_greedy}, lm-eval says {greedy} ({way})")


def compare_states(what: str, ours: dict[str, Tensor], theirs: dict[str, Any], tolerance: float) -> None:
    """Raise :class:`WrongResultError` if a tensor differs."""
    for name, their in theirs.items():
        if name not in ours:
            raise WrongResultError(f"{name} is missing in the {what}")
        our = ours[name]
        difference = (our.double() - their.double()).abs().max().item() if our.numel() else 0.0
        if not difference <= tolerance:
            raise WrongResultError(f"{name} differs by {difference:.3g} from the {what}")


def loaded(folder: Path, factory: Any = AutoModelForCausalLM) -> Any:
    """The model that transformers loads, if it loads every tensor."""
    model, info = factory.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind, names in info.items():
        if names:
            raise WrongResultError(
                f"transformers loads it with {kind}: {sorted(map(str, names))[0]} ({len(names)} in all)"
            )
    return model.eval()


def said(exc: BaseException) -> str:
    """One line about an exception, and where it came from."""
    frames = traceback.extract_tb(exc.__traceback__)
    where = "" if isinstance(exc, WrongResultError) else f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    text = " ".join(str(exc).split()).split(" Model type should be one of")[0]  # a list of all of them
    return f"{type(exc).__name__}: {text[:300]}{where}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep libraries from printing."""
    logging.disable(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
