"""Names of the known benchmarks, whose own tasks must not be searched."""

from __future__ import annotations

KNOWN_BENCHMARKS = tuple(
    """
    agieval ai2_arc aime anli arc arithmetic asdiv babi bbh bbq belebele bigbench blimp boolq ceval cmmlu cola
    commonsense_qa copa coqa crows_pairs drop eq_bench ethics fld global_mmlu glue gpqa gsm8k gsm_plus headqa
    hellaswag hendrycks humaneval ifeval kmmlu lambada leaderboard livebench logiqa math_word_problems mathqa
    mbpp mc_taco medmcqa medqa mgsm minerva_math mlqa mmlu mnli mrpc multirc musr mutual nq_open openbookqa
    paloma piqa prost pubmedqa qa4mre qasper qnli qqp race rte sciq sglue simpleqa social_iqa squad squadv2 sst2
    storycloze super_glue swag tinyArc tinyBenchmarks tinyGSM8k tinyHellaswag tinyMMLU tinyTruthfulQA
    tinyWinogrande toxigen triviaqa truthfulqa tydiqa webqs wikitext winogrande wmdp wnli wsc wsc273 xcopa xnli
    xquad xstorycloze xwinograd
    """.split()
)
"""Benchmarks whose own tasks are no objective: a merge searched on them has been fitted to the test."""


def is_benchmark(task: str) -> bool:
    """Whether an eval task's name is that of a known benchmark; ``..._train`` never is."""
    if task.endswith("_train"):
        return False
    return any(task == name or task.startswith((f"{name}_", f"{name}-")) for name in KNOWN_BENCHMARKS)
