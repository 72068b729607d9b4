"""The objective: what Optuna calls with a trial, and the one place where a trial meets a tensor.

    trial -> recipe -> merge into the resident model -> score a chunk -> report it -> prune? -> value
                                                              ^                         | no
                                                              +-------------------------+

This is the file to read first. On one side are Optuna and the storage, which know trials, parameters and values. On
the other are merging and evaluation, which know recipes, tensors and documents. ``MergeObjective`` joins them. It
works with any Optuna study, sampler, pruner and storage; ``run-study`` runs the same object. The rest is elsewhere:
the search in ``search/``, the merge in ``merging/`` behind ``loaders.py``, and the scoring in ``evaluation/``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import EngineDiedError, JudgementError, NonFiniteMergeError, StudyError, TaskError
from optuna_merge.evaluation.ahead import Ahead
from optuna_merge.evaluation.results import ChunkResult, Score
from optuna_merge.evaluation.scorer import Scorer
from optuna_merge.internals.optuna import known_state, known_trials, trial_id
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.recipe import Recipe
from optuna_merge.search.build import first_points, make_pruner, make_study_sampler
from optuna_merge.search.profile import Profile
from optuna_merge.search.pruner import paired_estimate
from optuna_merge.search.race import Race, RaceSchedule, best_of_race, make_spaces, space_of
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.storage.claims import Planned
from optuna_merge.storage.documents import DocumentScores, TrialDocuments
from optuna_merge.study.ascent import Climb, Climber, OnStep, ascend
from optuna_merge.study.ascent_process import climb_apart
from optuna_merge.study.description import describe_study
from optuna_merge.study.engines import lacking_for_ascent, make_loader, plan_ascent
from optuna_merge.study.fingerprint import study_fingerprint
from optuna_merge.study.first_trials import enqueue_ascent, enqueue_baselines
from optuna_merge.study.folder import claim_folder, documents_folder
from optuna_merge.study.judges import check_study_judge
from optuna_merge.study.loaders import LocalLoader, RecipeLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.replay import recorded_recipe, shared_profile
from optuna_merge.study.rivals import RivalModel, put_rivals
from optuna_merge.study.start import has_gradient, settle_start

_ANOTHER_FOLDER = (
    'choose another storage_path, such as MergeObjective.from_file(path, {"storage_path": "another_study"})'
)


class MergeObjective:
    """Scores the merge that a trial asks for.

    Call it with a trial, or pass it to ``study.optimize``. It returns the objective value, to be maximised; with
    ``goal: pareto`` it returns one value for each objective and prunes nothing. If the merge holds NaN or infinity,
    or its score is not finite, the value is NaN: Optuna then fails the trial and goes on. If the study's pruner says
    so, it raises ``optuna.TrialPruned``.

    There is one resident model, so with ``n_jobs`` above 1 the trials wait for each other.

    Attributes:
        config: The study file, with ``search.start`` settled.
        models: The checkpoints that are merged.
        spaces: The search space of each merge method; the study races them if there are several.
        space: The search space of the first method; ``space.distributions`` are its trial parameters.
        loader: Merges a recipe into the resident model.
        scorer: The eval tasks, prepared for the resident model.
        directions: ``"maximize"`` for each objective of the study file.
    """

    def __init__(self, config: StudyConfig, models: StudyModels, loader: RecipeLoader, scorer: Scorer) -> None:
        self.config, self._why_uniform = settle_start(
            config, scorer, lambda: lacking_for_ascent(config, models, scorer)
        )
        self.models = models
        self.spaces = make_spaces(config, models.refs)
        self.space = next(iter(self.spaces.values()))
        self.loader = loader
        self.scorer = scorer
        self.directions = [attributes.DIRECTION] * len(config.objectives)
        self._documents = DocumentScores(documents_folder(config.storage_path, config.study.name))
        self._study: optuna.Study | None = None  # whose folder is known to be this one's
        self._profile: Profile | None = None  # of that study
        self._loaded: str | None = None  # digest of the recipe whose weights the resident model has
        self._lock = threading.Lock()
        self._rival: RivalModel | None = None

    @classmethod
    def from_file(cls, path: Path | str, overrides: Mapping[str, Any] | None = None) -> MergeObjective:
        """Read a study file, open its models, build its engine and its eval tasks.

        Args:
            path: The study file.
            overrides: Dotted key to value; replaces what the file says.

        Raises:
            OptunaMergeError: If anything that the file names cannot be used.
        """
        return cls.from_config(load_study(path, overrides))

    @classmethod
    def from_config(cls, config: StudyConfig, note: Callable[[str], None] = lambda _: None) -> MergeObjective:
        """Like :meth:`from_file`, for a study file that has been read.

        Args:
            config: The study file.
            note: Called with a line about each model that answers before the first trial; see :meth:`put_rivals`.

        Raises:
            OptunaMergeError: If anything that the file names cannot be used.
        """
        check_study_judge(config)
        models = StudyModels.open(config)
        make_study_sampler(config, make_spaces(config, models.refs))  # reports a bad sampler before the slow steps
        loader, scorer = make_loader(config, models)
        objective = cls(config, models, loader, scorer)
        objective.put_rivals(note)
        return objective

    def put_rivals(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Give documents whose answers are compared the fixed answer that they lack; see ``study/rivals.py``."""
        self._rival = self._rival or put_rivals(self.config, self.models, self.space, self.scorer, self.load, note)

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Merge and score one trial; see :meth:`evaluate`."""
        return self.evaluate(trial)

    def evaluate(
        self,
        trial: optuna.Trial,
        on_chunk: Callable[[int], None] = lambda _: None,
        on_step: OnStep = lambda *_: None,
    ) -> float | tuple[float, ...]:
        """Merge and score one trial.

        Args:
            trial: A running trial of a study with this objective's ``directions``. Chunks that it has reported
                already, before it was interrupted, are not scored again.
            on_chunk: Called after each reported chunk with the number of chunks scored so far.
            on_step: Called after each step of the ascent, if the trial begins with it.

        Returns:
            The objective value, or a tuple of one for each objective; see the class.

        Raises:
            optuna.TrialPruned: If the study's pruner stops the trial.
            StudyError: If the study's directions differ from ``directions``, the folder ``storage_path`` belongs to
                another study, or the scores of the trial's documents cannot be read or written.
        """
        directions = [direction.name.lower() for direction in trial.study.directions]
        if directions != self.directions:
            raise StudyError(
                f"study {trial.study.study_name!r}: directions must be {', '.join(self.directions)}, got"
                f" {', '.join(directions)}; create it with directions={self.directions}"
            )
        with self._lock:
            if trial.study is not self._study:
                claim_folder(trial.study, self.config.storage_path, _ANOTHER_FOLDER)
                self._study, self._profile = trial.study, None
            return self._evaluate(trial, on_chunk, on_step)

    def load(self, recipe: Recipe) -> float:
        """Merge a recipe into the resident model, unless the model has these weights already.

        Returns:
            Seconds it took; 0 if there was nothing to do.

        Raises:
            NonFiniteMergeError: If a merged tensor holds NaN or infinity.
            EngineDiedError: If the engine dies during the load, is started again and dies again.
            MergeError, EngineError: If the merge fails, or memory runs out.
        """
        digest = recipe.digest()
        if self._loaded == digest:
            return 0.0
        self._loaded = None
        start = time.perf_counter()
        self.loader.load(recipe)
        self._loaded = digest
        return time.perf_counter() - start

    def recipe(self, trial: FrozenTrial, study: optuna.Study | None = None) -> Recipe:
        """The recipe of a trial, checked against the digest that the trial recorded.

        Args:
            trial: A trial of a study of this objective.
            study: Its study. It is needed if it began with an ascent that found a weight for each tensor, and this
                objective has not scored a trial of it.

        Raises:
            StudyError: If the study file no longer decodes the trial to the recipe that was scored.
        """
        profile = self._profile if study is None else shared_profile(study.get_trials(deepcopy=False))
        return recorded_recipe(trial, space_of(trial, self.spaces), self.models, profile)

    def merge_file(self, trial: FrozenTrial, comment: Sequence[str] = (), study: optuna.Study | None = None) -> str:
        """The mergekit YAML of a trial, with the models as the study file names them.

        Args:
            trial: A trial of the study.
            comment: Lines to put above the YAML.
            study: As in :meth:`recipe`.
        """
        template = self.models.template
        architectures = template.config.get("architectures") or [None]
        return to_mergekit(
            self.recipe(trial, study),
            names=[name for name in self.models.names if name not in template.copied],
            architecture=architectures[0],
            whole=template.whole,
            references=self.models.spelling,
            comment=comment,
        )

    def sampler(self, population: int | Mapping[str, int] | None = None) -> optuna.samplers.BaseSampler:
        """The sampler that the study file asks for.

        Args:
            population: Trials in a generation of CMA-ES, for each method if there are several. Default: the study
                file's, or one that follows from the numbers of weights and workers.
        """
        return make_study_sampler(self.config, self.spaces, population)

    def pruner(self) -> optuna.pruners.BasePruner:
        """The pruner that the study file asks for.

        Raises:
            StudyError: If it would make its first comparison only after all documents are scored.
        """
        return make_pruner(self.config, self.scorer.n_chunks)

    def ascend(self, study: optuna.Study) -> None:
        """Enqueue the ascent: a trial whose weights are found along the gradient of the expected score.

        Whoever runs the trial, such as ``study.optimize``, runs the ascent and scores its end; later trials have the
        profile that it found. ``run_study`` does the same if ``search.start`` says so; here it does not matter what
        that key says. A study that has an ascent, or has drawn merges already, goes on as it is. Threads and processes
        of your own do not wait for the end of the ascent before they draw merges: let it be the first trial, and alone.

        Raises:
            StudyError: If the study races methods, or no gradient is to be had.
        """
        enqueue_ascent(study, self.config, has_gradient=has_gradient(self.config, self.scorer))

    def enqueue_baselines(self, study: optuna.Study) -> None:
        """Enqueue what the search must beat, if the study has not drawn merges yet, and has not all of them.

        These are uniform merges, each source and the base. Of a race they are one uniform merge, the sources and the
        base; :meth:`plan` says what follows.

        Raises:
            StudyError: If the study has too few trials for a race.
        """
        enqueue_baselines(study, self.spaces, self.schedule)

    def schedule(self) -> RaceSchedule:
        """The schedule of the race that a new study begins with.

        Raises:
            StudyError: If the study has too few trials for it.
        """
        documents = [self.scorer.n_documents_in(chunk) for chunk in range(self.scorer.n_chunks)]
        return RaceSchedule.make(self.spaces, self.config.study.n_trials, documents, str(self.config.path))

    def plan(self, trials: Sequence[FrozenTrial]) -> list[Planned] | None:
        """What a study with these trials does next when none of them waits, see :data:`Plan`.

        ``run_study`` follows it. A loop of your own over a race must do so as well: pass what it returns to
        ``storage.claims.enqueue`` before each ``study.ask``.
        """
        if len(self.spaces) == 1:
            return None
        return Race(self.spaces, ascends=self.config.search.start == "ascent").plan(trials)

    @property
    def begins_with_ascent(self) -> bool:
        """Whether the study file wants :meth:`ascend` at the beginning; behind a race, :meth:`plan` sees to it."""
        return self.config.search.start == "ascent" and len(self.spaces) == 1

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a score of this study means; see :func:`study_fingerprint`."""
        return study_fingerprint(self.config, self.models, self.spaces, self.scorer, self._rival)

    def describe(self) -> list[str]:
        """What is about to be searched and scored, in a few lines."""
        lines = describe_study(self.config, self.models, self.spaces, self.scorer, self.loader.device)
        if self._why_uniform and len(self.spaces) == 1:
            lines.append(f"search: begins at a uniform merge; {self._why_uniform}")
        return lines if self._rival is None else [*lines, self._rival.describe()]

    def close(self) -> None:
        """Free the device's memory."""
        self.loader.close()

    def _evaluate(
        self, trial: optuna.Trial, on_chunk: Callable[[int], None], on_step: OnStep
    ) -> float | tuple[float, ...]:
        known = known_state(trial).user_attrs
        try:
            recipe = self._suggest(trial, on_step)
            digest = self.models.identify(recipe)
            trial.set_user_attr(attributes.RECIPE_DIGEST, digest)
            merge_s = self.load(recipe)
            trial.set_user_attr(attributes.MERGE_SECONDS, round(merge_s, 4))
            is_drawn = attributes.BASELINE not in known and attributes.ASCENT not in known
            is_prunable = is_drawn and len(self.directions) == 1 and attributes.RACE_CHUNKS not in known
            score = self._score(trial, digest, on_chunk, is_prunable=is_prunable)
        except (NonFiniteMergeError, EngineDiedError) as exc:
            self._loaded = None
            return self._fail(trial, str(exc))
        except JudgementError as exc:
            return self._fail(trial, str(exc))
        for name, task in score.tasks.items():
            trial.set_user_attr(f"{attributes.SCORE} {name}", task.value)
            if task.stderr is not None:
                trial.set_user_attr(f"{attributes.STDERR} {name}", task.stderr)
            if task.answers is not None:
                trial.set_user_attr(f"{attributes.ANSWERS} {name}", asdict(task.answers))
        if not math.isfinite(score.value):
            bad = [f"{name} {task.metric} = {task.value}" for name, task in score.tasks.items()]
            return self._fail(trial, f"score must be finite, got {', '.join(bad)}")
        return score.value if len(self.directions) == 1 else self._objective_values(score)

    def _suggest(self, trial: optuna.Trial, on_step: OnStep) -> Recipe:
        """The recipe of a trial, whose parameters are recorded; after an ascent with the study's profile."""
        known = known_state(trial).user_attrs
        if attributes.BASELINE in known:
            return self._baseline_recipe(trial, known[attributes.BASELINE])
        if len(self.spaces) > 1 and attributes.METHOD not in known:
            raise StudyError(
                f"{self.config.path}: genome.merge_method must be one method in a loop that does not plan a race,"
                f" got {', '.join(self.spaces)}; use run-study, or see MergeObjective.plan"
            )
        space = space_of(known_state(trial), self.spaces)
        if attributes.ASCENT in known:
            self._climb(trial, space, on_step)
            trials = [known_state(trial)]
        elif attributes.RACE_ROUND in known:
            return space.suggest(trial)
        else:
            trials = known_trials(trial.study)
        profile = self._profile = self._profile or shared_profile(trials)
        if profile is not None:
            trial.set_user_attr(attributes.PROFILE, profile.digest)
        return space.suggest(trial, profile)

    def _climb(self, trial: optuna.Trial, space: SearchSpace, on_step: OnStep) -> None:
        if isinstance(self.loader, LocalLoader):
            climber = Climber(self.config, space, self.models.places, self.scorer, self.loader.merger, self.load)
            climb: Climb = climber.climb
        else:
            climb = climb_apart(self.config, space.prefix, self.scorer.n_chunks, self.loader.device, self._make_room)
        starts = list(first_points(trial.study, self.config, space))
        starts += [best for best in best_of_race(known_trials(trial.study), space.prefix) if best not in starts]
        ascend(trial, climb, starts, on_step)

    def _make_room(self) -> None:
        """Free the device for an ascent in another process."""
        if self.loader.device != "cpu":
            plan_ascent(self.config, self.models, self.scorer).check()
        self.loader.close()
        self._loaded = None

    def _baseline_recipe(self, trial: optuna.Trial, name: str) -> Recipe:
        space = space_of(known_state(trial), self.spaces)
        recipe = space.baseline_recipe(name)
        if trial.user_attrs.get(attributes.BASELINE_KIND) == "uniform":
            space.suggest(trial)  # records the enqueued values as the trial's parameters
        return recipe

    def _score(self, trial: optuna.Trial, digest: str, on_chunk: Callable[[int], None], *, is_prunable: bool) -> Score:
        """Score chunk by chunk; report each to Optuna, which may prune the trial before the next one."""
        reported = dict(known_state(trial).intermediate_values)  # by an earlier start of the trial
        spent_s = known_state(trial).user_attrs.get(attributes.EVALUATION_SECONDS, 0.0)
        scored = self._read_scored(trial, digest, reported)
        results: list[ChunkResult] = []
        n_chunks = known_state(trial).user_attrs.get(attributes.RACE_CHUNKS, self.scorer.n_chunks)
        ahead = Ahead(self.scorer)
        with self._documents.begin(trial.number, digest, [line for line, _ in scored.values()]) as documents:
            for chunk in range(n_chunks):
                if chunk in reported and chunk in scored:
                    results.append(scored[chunk][1])
                    continue
                # also asks what a killed process did not come to ask
                if is_prunable and results and chunk not in reported and trial.should_prune():
                    self._record_cost(trial, spent_s, results, documents)
                    self._end_early(trial, results)
                start = time.perf_counter()
                following = next((n for n in range(chunk + 1, n_chunks) if n not in scored), None)
                result = scored[chunk][1] if chunk in scored else ahead.score(chunk, following)
                spent_s += time.perf_counter() - start
                results.append(result)
                if chunk not in scored:
                    documents.append(result.to_json())
                if chunk not in reported:
                    self._report(trial, result.score, chunk)
                on_chunk(len(results))
            self._record_cost(trial, spent_s, results, documents)
            if n_chunks < self.scorer.n_chunks:
                self._end_early(trial, results)
        return self.scorer.total(results, stderr=True)

    def _end_early(self, trial: optuna.Trial, results: Sequence[ChunkResult]) -> NoReturn:
        estimate = paired_estimate(trial.study, [result.score for result in results])
        if estimate is not None:
            trial.set_user_attr(attributes.PAIRED_ESTIMATE, estimate)
        raise optuna.TrialPruned

    def _read_scored(
        self, trial: optuna.Trial, digest: str, reported: Mapping[int, float]
    ) -> dict[int, tuple[str, ChunkResult]]:
        """The chunks that earlier starts of the trial scored, by number, with their lines.

        Of several lines for a chunk, which two owners of the trial may have written, the one that was reported counts.
        """
        if not reported:
            return {}  # what is there may be of an earlier study of the same name
        scored: dict[int, tuple[str, ChunkResult]] = {}
        for line in self._documents.read(trial.number, digest):
            try:
                result = ChunkResult.from_json(line)
            except TaskError as exc:
                path = self._documents.path(trial.number)
                raise StudyError(
                    f"{path}: scores must be readable, got {exc}; delete it: the trial is scored anew"
                ) from exc
            if result.chunk not in scored or result.score == reported.get(result.chunk):
                scored[result.chunk] = (line, result)
        return dict(sorted(scored.items()))

    def _report(self, trial: optuna.Trial, score: float, chunk: int) -> None:
        if len(self.directions) == 1:
            trial.report(score, chunk)
        else:  # Optuna's report refuses several objectives, its storages do not; a resumed trial reads the values back
            trial.storage.set_trial_intermediate_value(trial_id(trial), chunk, score)
            known_state(trial).intermediate_values[chunk] = score

    def _record_cost(
        self, trial: optuna.Trial, spent_s: float, results: Sequence[ChunkResult], documents: TrialDocuments
    ) -> None:
        documents.sync()
        trial.set_user_attr(attributes.EVALUATION_SECONDS, round(spent_s, 4))
        columns = [columns for result in results for columns in result.documents.values()]
        trial.set_user_attr(attributes.DOCUMENTS, sum(len(column["doc_id"]) for column in columns))

    def _objective_values(self, score: Score) -> tuple[float, ...]:
        """For each objective the sum of weight x metric over its tasks."""
        parts: dict[str, list[float]] = {name: [] for name in self.config.objectives}
        for task, scored in zip(self.config.tasks, score.tasks.values(), strict=True):
            parts[self.config.objective_of(task)].append(scored.weight * scored.value)
        return tuple(map(math.fsum, parts.values()))

    def _fail(self, trial: optuna.Trial, reason: str) -> float | tuple[float, ...]:
        """Record why a trial has no score; the NaN that is returned makes Optuna fail it."""
        trial.set_user_attr(attributes.FAILURE, reason)
        return math.nan if len(self.directions) == 1 else (math.nan,) * len(self.directions)
