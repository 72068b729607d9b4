"""The key of every attribute that a study or a trial carries."""

from __future__ import annotations

from typing import Literal

PAIRED_ESTIMATE = "paired_estimate"
"""User attribute of a pruned trial: the value that it would probably have had. The sampler learns from it."""

DIRECTION: Literal["maximize"] = "maximize"
"""Of every objective; a task with a negative weight is minimised."""

FINGERPRINT = "fingerprint"
"""Study: readable name to value of everything that decides what a score means."""
REQUESTS = "prompts and documents"
"""In the fingerprint: digest of every request of the eval tasks."""
CHUNKS = "study.n_chunks"
"""In the fingerprint: parts that the documents are cut into."""
WANTED = "n_trials"
"""Study: how many trials the latest run was asked for."""
POPULATION = "population"
"""Study: trials in a generation of CMA-ES, since it was begun."""
START = "start"
"""Study: where the search began, once it has."""
WARM_START = "warm_start"
"""Study: what the study that ``search.warm_start`` names said when this one was made."""

BASELINE = "baseline"
"""Trial: name of the baseline that it scores."""
BASELINE_KIND = "baseline_kind"
"""Trial: ``uniform``, ``source`` or ``base``."""
RECIPE_DIGEST = "recipe_digest"
"""Trial: digest of the recipe that was merged."""
MERGE_SECONDS = "merge_s"
"""Trial: time to merge and to load the merged weights."""
EVALUATION_SECONDS = "evaluation_s"
"""Trial: time to score, all starts of the trial together."""
DOCUMENTS = "n_documents"
"""Trial: documents that were scored."""
FAILURE = "failure"
"""Trial: why it failed."""
SCORE = "score"
"""Trial: prefix of each task's metric, ``score <task>``; its standard error is ``stderr <task>``."""
STDERR = "stderr"

TRIAL_ATTRIBUTES = (
    BASELINE,
    BASELINE_KIND,
    RECIPE_DIGEST,
    MERGE_SECONDS,
    EVALUATION_SECONDS,
    DOCUMENTS,
    FAILURE,
    PAIRED_ESTIMATE,
)
