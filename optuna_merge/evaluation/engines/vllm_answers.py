"""Turns planned questions and prompts into calls of vLLM, and its outputs into log-probabilities and texts.

Knows vLLM's sampling parameters and outputs. It does not know weights, nor how vLLM is started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna_merge.errors import EngineError, first_line
from optuna_merge.evaluation.engine import Request, Text
from optuna_merge.evaluation.engines.generation import GENERATION_SEED, cut_prompt
from optuna_merge.evaluation.engines.language import Encoded
from optuna_merge.evaluation.engines.next_tokens import Plan, Whole
from optuna_merge.evaluation.engines.vllm_instance import VLLMInstance
from optuna_merge.internals.lm_eval import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)


def answer_plan(instance: VLLMInstance, plan: Plan) -> list[tuple[float, bool]]:
    """Log-probability of each planned item, and whether greedy decoding would give it."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "detokenize": False}
    parameters = [SamplingParams(**common, logprob_token_ids=list(q.tokens)) for q in plan.questions]
    parameters += [
        SamplingParams(**common, prompt_logprobs=1, logprob_token_ids=[whole.tokens[-1]]) for whole in plan.wholes
    ]
    outputs = instance.complete(plan.prompts, parameters)
    n_questions = len(plan.questions)
    answers: list[tuple[float, bool]] = []
    for item, steps in enumerate(plan.steps):
        if steps is None:
            number = plan.whole_of[item]
            answers.append(_of_whole(outputs[n_questions + number], plan.wholes[number]))
            continue
        given = [(outputs[question].outputs[0], token) for question, token in steps]
        total = math.fsum(output.logprobs[0][token].logprob for output, token in given)
        answers.append((total, all(output.token_ids[0] == token for output, token in given)))
    return answers


def generate(instance: VLLMInstance, encoded: Encoded, *, window: int, eos: str) -> list[Text]:
    """Texts for the requests that are answered by text, in their order.

    Args:
        instance: A running vLLM.
        encoded: The requests.
        window: Tokens of the model's window.
        eos: Text of the end-of-sequence token, which stops every text.

    Raises:
        EngineError: If vLLM does not know a task's generation options.
    """
    from vllm import SamplingParams

    prompts, parameters, stops = [], [], []
    for _, request, tokens in encoded.generated:
        prompt, n_generated = cut_prompt(tokens, request, window)
        options, until = _generation_options(request, eos)
        seed = None if options.get("temperature") == 0 else GENERATION_SEED
        try:
            parameters.append(SamplingParams(max_tokens=n_generated, stop=until, seed=seed, **options))
        except (TypeError, ValueError) as exc:
            raise EngineError(
                f"request: vLLM must know its generation_kwargs: {first_line(exc)}; change the task"
            ) from exc
        prompts.append(tuple(prompt))
        stops.append(until)
    outputs = instance.complete(prompts, parameters)
    return [_text(output.outputs[0], until) for output, until in zip(outputs, stops, strict=True)]


def _of_whole(output: Any, whole: Whole) -> tuple[float, bool]:
    last = output.outputs[0]
    logprobs = [last.logprobs[0][whole.tokens[-1]].logprob]
    greedy = last.token_ids[0] == whole.tokens[-1]
    likeliest: Sequence[tuple[int, Any]] = list(zip(whole.prompt, output.prompt_logprobs, strict=True))
    for token, candidates in likeliest[whole.n_context :]:
        logprobs.append(candidates[token].logprob)
        greedy &= max(candidates, key=lambda other: candidates[other].logprob) == token
    return math.fsum(logprobs), greedy


def _text(completion: Any, until: list[str]) -> Text:
    text = postprocess_generated_text(completion.text, until, None)
    return Text(text, len(completion.token_ids), completion.finish_reason == "length")


def _generation_options(request: Request, eos: str) -> tuple[dict[str, Any], list[str]]:
    """Options for vLLM and stop texts, as lm-eval's vLLM model has them."""
    options: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
    until = [text for text in handle_stop_sequences(options.pop("until", None), eos) if text]
    options.pop("max_gen_toks")
    if not options.pop("do_sample"):
        # lm-eval's vLLM model sets no temperature where the task sets none, and vLLM then samples
        options["temperature"] = 0.0
    return {"skip_special_tokens": False, "spaces_between_special_tokens": False, **options}, until
