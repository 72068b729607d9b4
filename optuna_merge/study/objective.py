"""The objective: the only place where a trial meets a tensor.

    suggest -> merge into the resident model -> score chunk by chunk -> report -> prune, or the value

``MergeObjective`` is a callable for ``study.optimize`` with any Optuna study, sampler, pruner and storage. The command
line runs the same object.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
import torch
from optuna.trial import FrozenTrial

from optuna_merge.config.read import load_study
from optuna_merge.config.sections import StudyConfig
from optuna_merge.errors import (
    EngineDiedError,
    EngineError,
    NonFiniteMergeError,
    StudyError,
    TaskError,
    is_out_of_memory,
)
from optuna_merge.evaluation.engine import Engine, MakingEngine
from optuna_merge.evaluation.results import ChunkResult, Score
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.internals.optuna import known_state, trial_id
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import Recipe
from optuna_merge.search.build import make_pruner, make_sampler, never_prunes
from optuna_merge.search.pruner import paired_estimate
from optuna_merge.search.samplers import StableCmaEsSampler, population_size
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.documents import DocumentScores
from optuna_merge.study.engines import _merge_device, build_scorer, make_engine, make_vllm_engine, plan_memory
from optuna_merge.study.fingerprint import _first_generation, merge_fingerprint
from optuna_merge.study.models import StudyModels, recipe_of


class MergeObjective:
    """Scores the merge that a trial asks for.

    Calling it with a trial returns the objective value, to be maximised, or with ``goal: pareto`` one for each
    objective, and then nothing is pruned; NaN if the merge has a NaN or infinity, which
    makes Optuna fail the trial and go on. It raises ``optuna.TrialPruned`` when the study's pruner says so. There is
    one resident model: with ``n_jobs`` above 1, trials wait for each other.

    Attributes:
        config: The study file.
        models: Its checkpoints.
        space: Its search space; ``space.distributions`` are the trial parameters.
        scorer: Its eval tasks.
        directions: ``"maximize"`` for each objective of the study file.
        on_chunk: Called after each chunk with the number of chunks scored so far.
    """

    def __init__(
        self, config: StudyConfig, models: StudyModels, merger: Merger | None, engine: Engine, scorer: Scorer
    ) -> None:
        """Join the parts.

        Args:
            config: The study file.
            models: Its checkpoints.
            merger: Merges into the engine; None if the engine's workers merge.
            engine: Holds the merged model.
            scorer: Its eval tasks, prepared for the engine.
        """
        self.config = config
        self.directions = [attributes.DIRECTION] * len(config.objectives)
        self.models = models
        self.space = SearchSpace(config, models.refs)
        self.scorer = scorer
        self.on_chunk: Callable[[int], None] = lambda _: None
        self._merger = merger
        self._engine = engine
        self._documents = DocumentScores(config.storage_path / "documents" / config.study.name)
        self._loaded: str | None = None
        self._alone = threading.Lock()

    @classmethod
    def from_file(cls, path: Path | str, overrides: Mapping[str, Any] | None = None) -> MergeObjective:
        """Read a study file, open its models, load the resident model and build its eval tasks.

        Args:
            path: The study file.
            overrides: Dotted key to value, replacing what the file says.

        Raises:
            OptunaMergeError: If anything that the file names cannot be used.
        """
        return cls.from_config(load_study(path, overrides))

    @classmethod
    def from_config(cls, config: StudyConfig) -> MergeObjective:
        """The same from a study file that has been read."""
        models = StudyModels.open(config)
        make_sampler(config, SearchSpace(config, models.refs))  # what is wrong with it is said before all that is slow
        if config.engine.backend == "vllm":
            making = make_vllm_engine(config, models)
            return cls(config, models, None, making, build_scorer(config, making))
        engine = make_engine(config, models)
        device = _merge_device(config.engine.merge_device, engine)
        scorer = build_scorer(config, engine)
        plan = plan_memory(config, models, engine, tasks=scorer.describe())
        merger = Merger(
            models.views,
            device=device,
            tokenizer_source=models.refs.tokenizer_source,
            sources=models.plan_sources(config, torch.device(device), plan).placement,
        )
        return cls(config, models, merger, engine, scorer)

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Merge and score one trial; see the class.

        Raises:
            StudyError: If the study does not maximise as many values as the study file has objectives.
        """
        directions = [direction.name.lower() for direction in trial.study.directions]
        if directions != self.directions:
            raise StudyError(
                f"study {trial.study.study_name!r}: directions must be {', '.join(self.directions)}, got"
                f" {', '.join(directions)}; create it with directions={self.directions}"
            )
        with self._alone:
            return self._evaluate(trial)

    def _evaluate(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        baseline = trial.user_attrs.get(attributes.BASELINE)
        recipe = self.space.suggest(trial) if baseline is None else self._baseline_recipe(trial, baseline)
        digest = self.models.identify(recipe)
        trial.set_user_attr(attributes.RECIPE_DIGEST, digest)
        try:
            merge_s = self.load(recipe)
            trial.set_user_attr(attributes.MERGE_SECONDS, round(merge_s, 4))
            score = self._score(trial, digest, prunable=baseline is None and len(self.directions) == 1)
        except (NonFiniteMergeError, EngineDiedError) as exc:
            self._loaded = None
            trial.set_user_attr(attributes.FAILURE, str(exc))
            return self._nothing
        for name, task in score.tasks.items():
            trial.set_user_attr(f"{attributes.SCORE} {name}", task.value)
            if task.stderr is not None:
                trial.set_user_attr(f"{attributes.STDERR} {name}", task.stderr)
        if not math.isfinite(score.value):
            bad = [f"{name} {task.metric} = {task.value}" for name, task in score.tasks.items()]
            trial.set_user_attr(attributes.FAILURE, f"score must be finite, got {', '.join(bad)}")
            return self._nothing
        return score.value if len(self.directions) == 1 else self._values(score)

    @property
    def _nothing(self) -> float | tuple[float, ...]:
        return math.nan if len(self.directions) == 1 else (math.nan,) * len(self.directions)

    def _values(self, score: Score) -> tuple[float, ...]:
        """Of each objective: the sum of weight x metric of its tasks."""
        parts: dict[str, list[float]] = {name: [] for name in self.config.objectives}
        for task, scored in zip(self.config.tasks, score.tasks.values(), strict=True):
            parts[task.objective or task.name].append(scored.weight * scored.value)
        return tuple(map(math.fsum, parts.values()))

    def load(self, recipe: Recipe) -> float:
        """Merge a recipe into the resident model.

        Returns:
            Seconds it took; 0 if the model has these weights already.

        Raises:
            NonFiniteMergeError: If the result holds NaN or infinity.
            EngineDiedError: If the engine dies over it twice.
            MergeError, EngineError: If memory is out.
        """
        if self._loaded == recipe.digest():
            return 0.0
        self._loaded = None
        start = time.perf_counter()
        if self._merger is None:
            cast("MakingEngine", self._engine).load_made(recipe.to_json())
        else:
            in_place = str(self._merger.device) == self._engine.device
            try:
                self._engine.load_weights(self._merger.merge(recipe, out=self._engine.resident if in_place else None))
            except (MemoryError, RuntimeError) as exc:
                if not is_out_of_memory(exc):
                    raise
                raise EngineError(
                    f"engine: a merge must fit into the memory of {self._engine.device} while it is loaded, got"
                    f" {str(exc).strip().partition(chr(10))[0]}; use engine.sources: disk, a smaller"
                    " engine.batch_size or fewer workers, and run the same command again"
                ) from exc
        self._loaded = recipe.digest()
        return time.perf_counter() - start

    def recipe(self, trial: FrozenTrial) -> Recipe:
        """The recipe of a trial of the study, checked against the digest that the trial recorded.

        Raises:
            StudyError: If the study file no longer decodes the trial to the recipe that was scored.
        """
        return recipe_of(self.space, self.models, trial)

    def merge_file(self, trial: FrozenTrial, comment: Sequence[str] = ()) -> str:
        """The mergekit YAML of a trial, with the models as the study file names them.

        Args:
            trial: A trial of the study.
            comment: Lines above it.
        """
        architectures = self.models.template.config.get("architectures") or [None]
        return to_mergekit(
            self.recipe(trial),
            names=self.models.names,
            architecture=architectures[0],
            references=self.models.spelling,
            comment=comment,
        )

    def sampler(self, population: int | None = None) -> optuna.samplers.BaseSampler:
        """The sampler that the study file asks for.

        Args:
            population: Of CMA-ES; None: as the study file says, or by the numbers of weights and workers.
        """
        return make_sampler(self.config, self.space, population)

    def pruner(self) -> optuna.pruners.BasePruner:
        """The pruner that the study file asks for.

        Raises:
            StudyError: If its first comparison comes when all documents have been scored.
        """
        return make_pruner(self.config, self.scorer.n_chunks)

    def enqueue_baselines(self, study: optuna.Study) -> None:
        """Enqueue what the study has to beat, if it has no trials yet: uniform merges, each source, the base."""
        if study.get_trials(deepcopy=False):
            return
        for baseline in self.space.baselines:
            labels = {attributes.BASELINE: baseline.name, attributes.BASELINE_KIND: baseline.kind}
            study.enqueue_trial(dict(baseline.params), user_attrs=labels)

    def fingerprint(self) -> dict[str, Any]:
        """Readable name to value of everything that decides what a score of this study means, and where it began."""
        config = self.config
        return {
            **merge_fingerprint(config, self.models, self.space),
            "tasks": [
                f"{task.weight:g} x {task.name} {task.metric}"
                + (f" for {task.objective or task.name}" if len(self.directions) > 1 else "")
                for task in config.tasks
            ],
            "limit": config.limit,
            "num_fewshot": config.num_fewshot,
            "shuffle": config.shuffle,
            "holdout": None if config.holdout is None else config.holdout.model_dump(mode="json"),
            **_first_generation(config),
            "engine.backend": config.engine.backend,
            attributes.CHUNKS: self.scorer.n_chunks,
            attributes.REQUESTS: self.scorer.fingerprint()[:16],
            **({"engine.vllm": config.engine.vllm.deciding} if config.engine.backend == "vllm" else {}),
        }

    def describe(self) -> list[str]:
        """What is about to be searched and scored, in a few lines."""
        tasks, engine = self.scorer.describe(), self._engine
        held_out = sum(task.n_holdout for task in tasks.tasks)
        lines = [
            f"search: {len(self.space.distributions)} weights of {len(self.models.refs.sources)} models,"
            f" {self.models.refs.n_layers} layers, {self.config.genome.merge_method}",
            f"scoring: {tasks.n_documents} documents in {tasks.n_chunks} chunks, {held_out} held out;"
            f" {engine.dtype} on {engine.device}; chat template {tasks.chat_template_reason}",
        ]
        if warm_start := self.config.search.warm_start:
            lines.append(f"search: begins at the {warm_start.n_best} best trials of {warm_start.label}")
        if len(self.directions) > 1:
            lines.append(f"goal: a front of {', '.join(self.config.objectives)}; their sum chooses the best merge")
        if shared := self._shared_population():
            lines.append(shared)
        if unpruned := never_prunes(self.config, self.scorer.n_chunks):
            lines.append(unpruned)
        if self.scorer.not_means:
            names = ", ".join(self.scorer.not_means)
            lines.append(f"pruning judges {names} by what was scored so far: the metric is no mean over documents")
        return lines

    def _shared_population(self) -> str:
        n_workers, sampler = self.config.study.n_workers, self.sampler()
        if n_workers == 1 or not isinstance(sampler, StableCmaEsSampler):
            return ""
        population, usual = sampler.population_size, population_size(len(self.space.distributions))
        share = population / (population + n_workers - 1)
        if share < 0.8 or population == usual:
            return f"{n_workers} workers: CMA-ES learns from {share:.0%} of the trials, {population} in a generation"
        return (
            f"{n_workers} workers: generations of {population} trials instead of {usual}, so that CMA-ES learns from"
            f" {share:.0%} of the trials"
        )

    def close(self) -> None:
        """Free the device's memory."""
        self._engine.close()

    def _baseline_recipe(self, trial: optuna.Trial, name: str) -> Recipe:
        recipe = self.space.baseline_recipe(name)
        if trial.user_attrs.get(attributes.BASELINE_KIND) == "uniform":
            self.space.suggest(trial)  # records the enqueued values as the trial's parameters
        return recipe

    def _score(self, trial: optuna.Trial, digest: str, *, prunable: bool) -> Score:
        frozen = known_state(trial)  # as it was when the trial began, or was taken up again
        reported = sorted(frozen.intermediate_values)
        lines = self._documents.begin(trial.number, digest, len(reported))
        try:
            scored = [ChunkResult.from_json(line) for line in lines]
        except TaskError as exc:
            path = self._documents.path(trial.number)
            raise StudyError(
                f"{path}: scores must be readable, got {exc}; delete it: the trial is scored anew"
            ) from exc
        spent = frozen.user_attrs.get(attributes.EVALUATION_SECONDS, 0.0)
        results = scored[: len(reported)]
        for chunk in range(len(results), self.scorer.n_chunks):
            if prunable and results and trial.should_prune():  # also what a killed process had no time to ask
                self._note_spent(trial, spent, results)
                estimate = paired_estimate(trial.study, [result.score for result in results])
                if estimate is not None:
                    trial.set_user_attr(PAIRED_ESTIMATE, estimate)
                raise optuna.TrialPruned
            start = time.perf_counter()
            result = scored[chunk] if chunk < len(scored) else self.scorer.score_chunk(chunk)
            spent += time.perf_counter() - start
            results.append(result)
            self._documents.append(trial.number, result.to_json())
            self._report(trial, result.score, chunk)
            self.on_chunk(len(results))
        self._note_spent(trial, spent, results)
        return self.scorer.total(results, stderr=True)

    def _report(self, trial: optuna.Trial, score: float, chunk: int) -> None:
        if len(self.directions) == 1:
            trial.report(score, chunk)
        else:  # which Optuna refuses, though its storages keep them: what was scored is not scored again
            trial.storage.set_trial_intermediate_value(trial_id(trial), chunk, score)
            known_state(trial).intermediate_values[chunk] = score

    def _note_spent(self, trial: optuna.Trial, spent: float, results: list[ChunkResult]) -> None:
        self._documents.end(trial.number)
        trial.set_user_attr(attributes.EVALUATION_SECONDS, round(spent, 4))
        columns = [columns for result in results for columns in result.documents.values()]
        trial.set_user_attr(attributes.DOCUMENTS, sum(len(column["doc_id"]) for column in columns))
