"""The objective: the only place where a trial meets a tensor.

    suggest -> merge into the resident model -> score chunk by chunk -> report -> prune, or the value

``MergeObjective`` is a callable for ``study.optimize`` with any Optuna study, sampler, pruner and storage. The command
line runs the same object.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.checkpoints.checkpoint import Checkpoint, ResolvedReference, common_names, resolve
from optuna_merge.checkpoints.vocabulary import unify
from optuna_merge.config.sections import StudyConfig, TaskConfig, load_study
from optuna_merge.errors import (
    CheckpointError,
    EngineDiedError,
    EngineError,
    NonFiniteMergeError,
    StudyError,
    TaskError,
    is_out_of_memory,
)
from optuna_merge.evaluation.engine import Engine, MakingEngine
from optuna_merge.evaluation.scorer import ChunkResult, Description, EvalTask, Score, Scorer
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.placement import SourcePlan, free_host_bytes, plan_sources
from optuna_merge.merging.worker import FACTORY, describe_source
from optuna_merge.recipe import Dtype, Recipe
from optuna_merge.search.pruner import SignedRankPruner, best_point
from optuna_merge.search.samplers import (
    GP_EVERY,
    PAIRED_ESTIMATE,
    StableCmaEsSampler,
    StableRandomSampler,
    make_gp,
    make_named_sampler,
    population_size,
)
from optuna_merge.search.space import ModelRefs, SearchSpace
from optuna_merge.search.warm_start import record_warm_start
from optuna_merge.storage import open as store
from optuna_merge.study.memory import CPU_KV_CACHE_BYTES, MemoryPlan, plan_hf, plan_vllm

_PRUNERS: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
    "wilcoxon": SignedRankPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "none": optuna.pruners.NopPruner,
}
_DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class StudyModels:
    """The checkpoints of a study, open, and compared with each other.

    Attributes:
        refs: Their resolved references, depth and the merged model's dtype.
        spelling: Resolved reference, model and adapter apart, to what a reader elsewhere should be told: a hub name
            as it was written, or the absolute path of a folder.
        checkpoints: Resolved reference to checkpoint, the base first.
        resolved: Where they were found, in the same order.
    """

    refs: ModelRefs
    spelling: Mapping[str, str]
    checkpoints: Mapping[str, Checkpoint]
    resolved: tuple[ResolvedReference, ...]

    @classmethod
    def open(cls, config: StudyConfig) -> StudyModels:
        """Find and open the checkpoints of a study file; loads no weights.

        Raises:
            CheckpointError: If one is missing or damaged.
        """
        folder = config.path.resolve().parent
        base = config.genome.base_model
        resolved = {
            reference: resolve(reference, folder)
            for reference in dict.fromkeys([*([base] if base else []), *config.sources])
        }
        _refuse_twice(resolved.values())
        checkpoints = {found.name: Checkpoint.open(found) for found in resolved.values()}
        first = next(iter(checkpoints.values()))
        refs = ModelRefs(
            sources=tuple(resolved[reference].name for reference in config.sources),
            base=None if base is None else resolved[base].name,
            n_layers=first.n_layers,
            dtype=config.dtype or _stored_dtype(first),
            tokenizer_source=_tokenizer_source(config, resolved, next(iter(checkpoints))),
        )
        spelling = {name: written for found in resolved.values() for name, written in found.spellings.items()}
        return cls(refs, spelling, checkpoints, tuple(resolved.values()))

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """Resolved reference to a digest of the checkpoint's content, whatever its folder is called."""
        return {reference: checkpoint.content_digest() for reference, checkpoint in self.checkpoints.items()}

    def identify(self, recipe: Recipe) -> str:
        """Digest of a recipe with contents in the place of references: the same wherever the models lie."""
        return replace(
            recipe,
            models=tuple(self.contents[model] for model in recipe.models),
            base_model=None if recipe.base_model is None else self.contents[recipe.base_model],
            tokenizer_source=self.contents.get(recipe.tokenizer_source or "", recipe.tokenizer_source),
        ).digest()

    @cached_property
    def views(self) -> Mapping[str, Checkpoint]:
        """Resolved reference to its checkpoint as the merge sees it: in one vocabulary, with the same tensors.

        Raises:
            CheckpointError: If the models do not go together.
        """
        return unify(self.checkpoints, self.refs.tokenizer_source)

    @property
    def template(self) -> Checkpoint:
        """The checkpoint whose configuration and tokenizer the merged model has."""
        first = next(iter(self.views))
        return self.views.get(self.refs.tokenizer_source or first, self.views[first])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the merged model's tensors."""
        return common_names(list(self.views.values()))

    def plan_sources(self, config: StudyConfig, device: torch.device, memory: MemoryPlan) -> SourcePlan:
        """Where the models to merge will live.

        Args:
            config: Whose ``engine.sources`` is wanted.
            device: Where they are merged.
            memory: What else the device holds.

        Raises:
            EngineError: If they do not fit where they are wanted.
        """
        return plan_sources(
            config.engine.sources,
            self.views.values(),
            self.names,
            device,
            gpu_free=max(0, memory.left),
            host_free=free_host_bytes(),
        )

    @contextmanager
    def described(self) -> Iterator[Path]:
        """A folder with the merged model's configuration and tokenizer, for as long as it is needed."""
        if self.template.is_as_stored:
            yield self.template.path
            return
        with TemporaryDirectory(prefix="optuna-merge-") as folder:
            self.template.write_description(Path(folder), self.refs.dtype, copy_code=True)
            yield Path(folder)


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
        self.directions = [store.DIRECTION] * len(config.objectives)
        self.models = models
        self.space = SearchSpace(config, models.refs)
        self.scorer = scorer
        self.on_chunk: Callable[[int], None] = lambda _: None
        self._merger = merger
        self._engine = engine
        self._documents = store.DocumentScores(config.storage_path / "documents" / config.study.name)
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
        baseline = trial.user_attrs.get(store.BASELINE)
        recipe = self.space.suggest(trial) if baseline is None else self._baseline_recipe(trial, baseline)
        digest = self.models.identify(recipe)
        trial.set_user_attr(store.RECIPE_DIGEST, digest)
        try:
            merge_s = self.load(recipe)
            trial.set_user_attr(store.MERGE_SECONDS, round(merge_s, 4))
            score = self._score(trial, digest, prunable=baseline is None and len(self.directions) == 1)
        except (NonFiniteMergeError, EngineDiedError) as exc:
            self._loaded = None
            trial.set_user_attr(store.FAILURE, str(exc))
            return self._nothing
        for name, task in score.tasks.items():
            trial.set_user_attr(f"{store.SCORE} {name}", task.value)
            if task.stderr is not None:
                trial.set_user_attr(f"{store.STDERR} {name}", task.stderr)
        if not math.isfinite(score.value):
            bad = [f"{name} {task.metric} = {task.value}" for name, task in score.tasks.items()]
            trial.set_user_attr(store.FAILURE, f"score must be finite, got {', '.join(bad)}")
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
            attributes = {store.BASELINE: baseline.name, store.BASELINE_KIND: baseline.kind}
            study.enqueue_trial(dict(baseline.params), user_attrs=attributes)

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
            store.CHUNKS: self.scorer.n_chunks,
            store.REQUESTS: self.scorer.fingerprint()[:16],
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
        if trial.user_attrs.get(store.BASELINE_KIND) == "uniform":
            self.space.suggest(trial)  # records the enqueued values as the trial's parameters
        return recipe

    def _score(self, trial: optuna.Trial, digest: str, *, prunable: bool) -> Score:
        frozen = trial._cached_frozen_trial  # as it was when the trial began, or was taken up again
        reported = sorted(frozen.intermediate_values)
        lines = self._documents.begin(trial.number, digest, len(reported))
        try:
            scored = [ChunkResult.from_json(line) for line in lines]
        except TaskError as exc:
            path = self._documents.path(trial.number)
            raise StudyError(
                f"{path}: scores must be readable, got {exc}; delete it: the trial is scored anew"
            ) from exc
        spent = frozen.user_attrs.get(store.EVALUATION_SECONDS, 0.0)
        results = scored[: len(reported)]
        for chunk in range(len(results), self.scorer.n_chunks):
            if prunable and results and trial.should_prune():  # also what a killed process had no time to ask
                self._note_spent(trial, spent, results)
                estimate = paired_estimate(trial.study, results)
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
            trial.storage.set_trial_intermediate_value(trial._trial_id, chunk, score)
            trial._cached_frozen_trial.intermediate_values[chunk] = score

    def _note_spent(self, trial: optuna.Trial, spent: float, results: list[ChunkResult]) -> None:
        self._documents.end(trial.number)
        trial.set_user_attr(store.EVALUATION_SECONDS, round(spent, 4))
        columns = [columns for result in results for columns in result.documents.values()]
        trial.set_user_attr(store.DOCUMENTS, sum(len(column["doc_id"]) for column in columns))


def paired_estimate(study: optuna.Study, results: list[ChunkResult]) -> float | None:
    """What a pruned trial's value would probably have been.

    The best merge's full value plus the mean difference over the chunks that both were scored on. In a synthetic study
    of 12 dimensions with equal document budgets, CMA-ES told so ended at 0.55 of the loss of no pruning; not told of
    pruned trials at all, at 3.5 times it.

    Args:
        study: Its best trial that is a point of the search space is what is compared with.
        results: The pruned trial's chunks, from the first on.

    Returns:
        None if no such trial is complete, or the best one reported none of the chunks.
    """
    best = best_point(study)
    if best is None:
        return None
    pairs = [
        (result.score, best.intermediate_values[chunk])
        for chunk, result in enumerate(results)
        if chunk in best.intermediate_values
    ]
    if not pairs or best.value is None:
        return None
    return best.value + math.fsum(ours - theirs for ours, theirs in pairs) / len(pairs)


def merge_fingerprint(config: StudyConfig, models: StudyModels, space: SearchSpace) -> dict[str, Any]:
    """The part of a study's fingerprint that decides what a trial's parameters are merged to."""
    genome, refs, contents = config.genome, models.refs, models.contents
    return {
        "genome.models": list(space.labels),
        "genome.merge_method": genome.merge_method,
        "genome.layer_granularity": genome.layer_granularity,
        "genome.filters": list(genome.filters),
        "genome.normalize": genome.normalize,
        "genome.rescale": genome.rescale,
        "genome.smooth": genome.smooth,
        "genome.tokenizer_source": genome.tokenizer_source,
        "search.embed_group": config.search.embed_group,
        "search constants": {name: r.low for name, r in config.search.ranges.items() if r.is_constant},
        "search space": {name: [d.low, d.high] for name, d in space.distributions.items()},
        "study.seed": config.study.seed,
        "dtype": refs.dtype,
        "content of base_model": None if refs.base is None else contents[refs.base][:16],
        **{
            f"content of {label}": contents[source][:16]
            for label, source in zip(space.labels, refs.sources, strict=True)
        },
    }


def _first_generation(config: StudyConfig) -> dict[str, Any]:
    """What CMA-ES reads once, when it begins: a study that goes on would not notice that it has changed."""
    sampler, prior = config.study.sampler, config.search.prior
    warm_start = config.search.warm_start
    starts = {name: found.start for name, found in config.search.ranges.items() if found.start is not None}
    return {
        "study.sampler.popsize": sampler.popsize,
        "study.sampler.sigma0": sampler.sigma0,
        "search.prior": prior.name if prior.name == "isotropic" else prior.model_dump(mode="json", exclude={"name"}),
        "search starts": starts,
        "search.warm_start": warm_start and {"study": warm_start.label, "n_best": warm_start.n_best},
        "random_init": config.random_init,
    }


def make_engine(config: StudyConfig, models: StudyModels) -> Engine:
    """The resident engine of a study, its weights not yet loaded."""
    from optuna_merge.evaluation.engines.hf import HFEngine

    size = config.engine.batch_size
    with models.described() as folder:
        return HFEngine(
            folder,
            dtype=models.refs.dtype,
            device=config.engine.device,
            batch_tokens="auto" if size == "auto" else make_describing_engine(config, models).batch_tokens,
            names=models.names,
            trust_remote_code=config.engine.trust_remote_code,
        )


def make_vllm_engine(config: StudyConfig, models: StudyModels) -> MakingEngine:
    """The vLLM engine of a study, its workers told where the models are; vLLM itself starts with the first merge.

    Raises:
        EngineError: If vLLM is not installed, or lacks what is needed.
    """
    from optuna_merge.evaluation.engines.vllm import require_vllm

    require_vllm()
    plan = plan_memory(config, models, _vllm_engine(config, models))
    plan.check()
    share = {"gpu_memory_utilization": plan.utilization} if plan.card else {"kv_cache_memory_bytes": plan.kv_cache}
    return _vllm_engine(config, models, share)


def _vllm_engine(config: StudyConfig, models: StudyModels, defaults: Mapping[str, Any] | None = None) -> MakingEngine:
    from optuna_merge.evaluation.engines.vllm import VLLMEngine

    source = describe_source(models.resolved, models.refs.tokenizer_source, config.engine.merge_device)
    engine = VLLMEngine(
        models.described,
        shapes={name: models.template.shape(name) for name in models.names},
        dtype=models.refs.dtype,
        source=(FACTORY, source),
        options={**(defaults or {}), **config.engine.vllm.options},
        trust_remote_code=config.engine.trust_remote_code,
    )
    if config.engine.device not in ("auto", engine.device, engine.device.partition(":")[0]):
        raise EngineError(
            f"engine.device must be auto for vllm, which runs on {engine.device}, got {config.engine.device};"
            " choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    return engine


def make_describing_engine(config: StudyConfig, models: StudyModels, card: int | None = None) -> Engine:
    """An engine that renders and tokenizes requests, in batches as on the study's device, and holds no weights.

    Args:
        config: The study file.
        models: Its checkpoints.
        card: As of :func:`plan_memory`.
    """
    if config.engine.backend == "vllm":
        return _vllm_engine(config, models)
    from optuna_merge.evaluation.engines.hf import CUDA_BATCH_TOKENS, HFEngine

    size = config.engine.batch_size
    with models.described() as folder:
        engine = HFEngine.tokenizer_only(
            folder,
            dtype=models.refs.dtype,
            batch_tokens=CUDA_BATCH_TOKENS if _card(config, card) else "auto",
            trust_remote_code=config.engine.trust_remote_code,
        )
    if size != "auto":
        engine.batch_tokens = size * build_scorer(config, engine).describe().longest
    return engine


def _card(config: StudyConfig, card: int | None) -> int:
    """Bytes of the GPU that a study runs on; 0 if it runs on none."""
    if card is not None:
        return card
    on_card = torch.cuda.is_available() and config.engine.device != "cpu"
    return torch.cuda.get_device_properties(0).total_memory if on_card else 0


def plan_memory(
    config: StudyConfig,
    models: StudyModels,
    engine: Engine,
    card: int | None = None,
    tasks: Description | None = None,
) -> MemoryPlan:
    """What a study takes of a card's memory.

    Args:
        config: The study file.
        models: Its checkpoints.
        engine: Its engine; one without weights will do.
        card: Bytes of the card; None: of the one that is found, 0 if there is none.
        tasks: What is scored; need not be known for vLLM, which plans what that takes itself.
    """
    card = _card(config, card)
    shapes = {name: models.template.shape(name) for name in models.names}
    itemsize = getattr(torch, models.refs.dtype).itemsize
    n_models, described = len(models.checkpoints), models.template.config
    if config.engine.backend == "hf":
        assert tasks is not None
        return plan_hf(
            shapes,
            described,
            itemsize=itemsize,
            n_models=n_models,
            n_padded=tasks.n_padded,
            n_scored=tasks.n_scored,
            n_cached=tasks.n_cached,
            card=card,
        )
    options = {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} if card == 0 else {}
    options |= {"max_num_batched_tokens": engine.batch_tokens, **config.engine.vllm.options}
    return plan_vllm(shapes, described, itemsize=itemsize, n_models=n_models, card=card, options=options)


def _merge_device(wanted: str, engine: Engine) -> str:
    if wanted == "auto":
        return engine.device
    if wanted == "cpu":
        return wanted
    index, n_devices = int(wanted.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= n_devices:
        raise EngineError(
            f"engine.merge_device must be there, got {wanted} ({n_devices} CUDA devices found); use cpu or auto"
        )
    return f"cuda:{index}"


def build_scorer(config: StudyConfig, engine: Engine) -> Scorer:
    """The eval tasks of a study file, their requests prepared for an engine."""
    holdout = config.holdout
    return Scorer.build(
        engine,
        [_eval_task(task) for task in config.tasks],
        task_search_path=config.task_search_path,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        shuffle=config.shuffle,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        holdout=None if holdout is None else holdout.fraction or [_eval_task(task) for task in holdout.tasks],
        seed=config.study.seed,
        n_chunks=config.study.n_chunks,
        allow_unsafe_code=config.allow_unsafe_code,
    )


def make_sampler(config: StudyConfig, space: SearchSpace, population: int | None = None) -> optuna.samplers.BaseSampler:
    """The sampler that a study file asks for; see :meth:`MergeObjective.sampler`.

    Raises:
        StudyError: If there is none, or it does not take its options.
    """
    import numpy as np

    options, seed = config.study.sampler, config.study.seed
    if options.name == "random":
        return StableRandomSampler(seed=seed)
    if options.name != "cmaes":
        return make_named_sampler(options.name, options.options, list(space.distributions), seed)

    def start(study: optuna.Study) -> Mapping[str, float]:
        recorded: dict[str, float] | None = study.user_attrs.get(store.START)
        if recorded is None:
            recorded = space.start(best_uniform(study, space), np.random.default_rng(seed))
            recorded |= record_warm_start(study, config, space)
            study.set_user_attr(store.START, recorded)
        return recorded

    every = GP_EVERY if options.gp_every is None else options.gp_every
    return StableCmaEsSampler(
        space.distributions,
        seed=seed,
        start=start,
        covariance=space.covariance(),
        popsize=population or options.popsize or population_size(len(space.distributions), config.study.n_workers),
        injected=make_gp(list(space.distributions), seed) if every else None,
        inject_every=every or 1,
    )


def make_pruner(config: StudyConfig, n_chunks: int) -> optuna.pruners.BasePruner:
    """The pruner that a study file asks for.

    Args:
        config: The study file.
        n_chunks: Chunks that the documents are cut into.

    Raises:
        StudyError: If its first comparison comes when all documents have been scored.
    """
    name, options = config.study.pruner.name, config.study.pruner.options
    for option in ("min_resource", "n_startup_steps", "n_warmup_steps"):
        if options.get(option, 0) >= max(2, n_chunks):
            raise StudyError(
                f"{config.path}: study.pruner.{option} must be below the number of chunks, {n_chunks}, got"
                f" {options[option]}; lower it or raise study.n_chunks"
            )
    return _PRUNERS[name](**options)


def never_prunes(config: StudyConfig, n_chunks: int) -> str:
    """A line that says so where the documents make too few chunks for the default pruner; "" where they do not."""
    pruner = make_pruner(config, n_chunks)
    if not isinstance(pruner, SignedRankPruner) or pruner.n_least < n_chunks:
        return ""
    return (
        f"pruning: never, the documents make {n_chunks} chunks and it takes more than {pruner.n_least}; raise limit or"
        " study.n_chunks"
    )


def best_uniform(study: optuna.Study, space: SearchSpace) -> Mapping[str, float]:
    """Parameters of the best uniform merge that the study has scored; of the plain one if it has scored none."""
    scored = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get(store.BASELINE_KIND) == "uniform" and trial.params.keys() == space.distributions.keys()
    ]
    if not scored:
        return space.uniform()
    return max(scored, key=lambda trial: store.score_of(trial) or -math.inf).params


def recipe_of(space: SearchSpace, models: StudyModels, trial: FrozenTrial) -> Recipe:
    """The recipe of a trial; see :meth:`MergeObjective.recipe`."""
    recorded = trial.user_attrs.get(store.RECIPE_DIGEST)
    if recorded is None:
        raise StudyError(f"trial {trial.number}: must have been merged, it is {trial.state.name.lower()}; see status")
    baseline = trial.user_attrs.get(store.BASELINE)
    recipe = space.decode(trial.params) if baseline is None else space.baseline_recipe(baseline)
    if recorded != models.identify(recipe):
        raise StudyError(
            f"trial {trial.number}: recipe must be the one that was scored ({recorded[:12]}), the study file and its"
            f" models now give {models.identify(recipe)[:12]}; restore them"
        )
    return recipe


def _eval_task(task: TaskConfig) -> EvalTask:
    return EvalTask(task.name, task.weight, task.metric, task.metadata or None)


def _refuse_twice(models: Iterable[ResolvedReference]) -> None:
    seen: dict[str, str] = {}
    for model in models:
        if model.name in seen:
            raise CheckpointError(
                f"genome: {model.reference!r} and {seen[model.name]!r} must be different models, both are {model.name};"
                " drop one or spell them alike"
            )
        seen[model.name] = model.reference


def _tokenizer_source(config: StudyConfig, resolved: Mapping[str, ResolvedReference], first: str) -> str | None:
    wanted = config.genome.tokenizer_source
    if wanted is None or wanted == "base":
        return first if wanted else None
    return resolved[wanted].name if wanted in resolved else wanted


def _stored_dtype(checkpoint: Checkpoint) -> Dtype:
    """The dtype that most of a checkpoint's weights are stored in."""
    counts: dict[str, int] = {}
    for name in checkpoint.names:
        dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
        counts[dtype] = counts.get(dtype, 0) + math.prod(checkpoint.shape(name))
    most = max(counts, key=lambda dtype: counts[dtype])
    for dtype in _DTYPES:
        if dtype == most:
            return dtype
    raise CheckpointError(f"{checkpoint.reference}: dtype must be one of {', '.join(_DTYPES)}, got {most}")
