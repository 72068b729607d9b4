"""The key of every user attribute that we set on a study or a trial.

The keys are part of recorded studies: they never change.
"""

from __future__ import annotations

from typing import Literal

PAIRED_ESTIMATE = "paired_estimate"
"""Pruned trial: the value that it would probably have had; samplers learn from it."""

DIRECTION: Literal["maximize"] = "maximize"
"""The direction of every objective; a negative weight lets a metric be minimised."""

FINGERPRINT = "fingerprint"
"""Study: everything that decides what a score means, as readable name to value."""
REQUESTS = "prompts and documents"
"""Key in the fingerprint: digest of every request of the eval tasks."""
CHUNKS = "study.n_chunks"
"""Key in the fingerprint: number of chunks that the documents are cut into."""
SEARCH_START = "search.start"
"""Key in the fingerprint: ``ascent`` if the study began with one; else None."""
STUDY_ID = "study_id"
"""Study: a random id; its folder has the same in ``study.json``."""
WANTED = "n_trials"
"""Study: ``n_trials`` of the latest run."""
POPULATION = "population"
"""Study: trials in a generation of CMA-ES, fixed when the study was created."""
START = "start"
"""Study: the point where the search began, set when the first trial is drawn."""
WARM_START = "warm_start"
"""Study: what was read from the study of ``search.warm_start`` when this one was created."""

BASELINE = "baseline"
"""Trial: name of the baseline that it scores; absent from other trials."""
ASCENT = "ascent"
"""Trial: it begins with the ascent, whose end are its parameters; absent from other trials."""
ASCENT_DOCUMENTS = "ascent_n_documents"
"""Trial that begins with the ascent: documents that were differentiated."""
ASCENT_SECONDS = "ascent_s"
"""Trial that begins with the ascent: seconds that all steps took."""
PROFILE = "profile"
"""Trial: digest of the profile that it was merged with; absent without one."""

BASELINE_KIND = "baseline_kind"
"""Trial: ``uniform``, ``source`` or ``base``."""
RECIPE_DIGEST = "recipe_digest"
"""Trial: digest of the recipe that was merged."""
MERGE_SECONDS = "merge_s"
"""Trial: seconds taken to merge and to load the merged weights."""
EVALUATION_SECONDS = "evaluation_s"
"""Trial: seconds taken to score, summed over all starts of the trial."""
DOCUMENTS = "n_documents"
"""Trial: number of documents that were scored."""
FAILURE = "failure"
"""Trial: why it failed."""
SCORE = "score"
"""Trial: prefix of each task's metric, ``score <task>``."""
STDERR = "stderr"
"""Trial: prefix of the metric's standard error, ``stderr <task>``."""
ANSWERS = "answers"
"""Trial: prefix of how a task's generated answers came about, ``answers <task>``."""
