"""The names of known benchmarks, whose own tasks must not be searched.

Knows names only; does not know what lm-eval has of each benchmark.
"""

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
"""A merge that was searched on a benchmark's own task has been fitted to the benchmark."""


def is_benchmark(task: str) -> bool:
    """Whether an eval task belongs to a known benchmark, by its name; one that ends in ``_train`` never does."""
    if task.endswith("_train"):
        return False
    return any(task == name or task.startswith((f"{name}_", f"{name}-")) for name in KNOWN_BENCHMARKS)
