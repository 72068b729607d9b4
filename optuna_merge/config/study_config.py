"""A whole study file.

Knows the keys at its top and what follows from several sections together. Does not open a model, a task or a storage:
whatever can be seen only there is checked where it is opened. A mergekit-evolve file is a study file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from optuna_merge.config.engine import EngineConfig
from optuna_merge.config.genome import GenomeConfig
from optuna_merge.config.judge import JudgeConfig
from optuna_merge.config.paths import FilePath, study_file
from optuna_merge.config.search import SearchConfig
from optuna_merge.config.section import YAML_LIST, Section
from optuna_merge.config.study import StudyOptions
from optuna_merge.config.tasks import HoldoutConfig, TaskConfig
from optuna_merge.methods import MergeMethod, find_method
from optuna_merge.recipe import Dtype

_PATH = "(the study file)"
"""Where ``path`` comes from; no study file has this key, so that ``path`` is an unknown key there."""


AUTO = "auto"
"""The ``merge_method`` that stands for one of the following lists."""
AUTO_WITH_BASE = ("task_arithmetic", "ties", "dare_ties", "della")
AUTO_OF_TWO = ("linear", "slerp", "multislerp")
AUTO_OF_MANY = ("linear", "multislerp")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


class StudyConfig(Section):
    """A study file, read and checked.

    To be validated with the study file's path as context: paths are relative to its folder, and it names the study.

    Attributes:
        path: The study file.
        limit: Documents of each task, or the fraction of them if below 1; None: all.
        num_fewshot: Examples in each prompt; None: as the task says.
        shuffle: Shuffle each task's documents (seeded) before ``limit``.
        random_init: Start at a random point instead of the best uniform merge.
        apply_chat_template: Put prompts into the tokenizer's chat template; None: if it has one.
        fewshot_as_multiturn: With a chat template, write few-shot examples as turns of a conversation.
        storage_path: Folder for everything that the study writes; by default the study's name with ``_study``.
        task_search_path: Folders with eval tasks of your own.
        holdout: What only the final report scores; None: nothing is held out.
        judge: The model that judges the answers of judged tasks; None: there is none.
        allow_benchmark_tasks: Let a known benchmark's own task be searched.
        allow_unsafe_code: Let tasks run code that the model generates.
    """

    path: Path = Field(validation_alias=_PATH)
    genome: GenomeConfig
    tasks: Annotated[tuple[TaskConfig, ...], YAML_LIST, Field(min_length=1)]
    limit: float | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool = True
    study: StudyOptions = StudyOptions()
    engine: EngineConfig = EngineConfig()
    search: SearchConfig = SearchConfig()
    storage_path: FilePath
    task_search_path: Annotated[tuple[FilePath, ...], YAML_LIST, BeforeValidator(_one_or_more)] = ()
    holdout: HoldoutConfig | None = None
    judge: JudgeConfig | None = None
    allow_benchmark_tasks: bool = False
    allow_unsafe_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _name_after_the_file(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        path = study_file(info)
        filled = {**value, _PATH: path}
        name: Any = path.stem
        study = {} if value.get("study") is None else value["study"]
        if isinstance(study, Mapping):
            name = study.get("name") or name
            filled["study"] = {**study, "name": name}
        if value.get("storage_path") is None:
            filled["storage_path"] = f"{name}_study"
        return filled

    @field_validator("limit")
    @classmethod
    def _limit(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("a whole number, or a fraction below 1")
        return value

    @property
    def question(self) -> str:
        """The question that the study answers: the comment in the file's first line; empty if there is none."""
        try:
            first = self.path.read_text(encoding="utf-8").partition("\n")[0]
        except OSError:
            return ""
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names of the merge methods; several are raced against each other."""
        genome = self.genome
        if genome.merge_method == AUTO:
            if genome.base_model is not None:
                return AUTO_WITH_BASE
            return AUTO_OF_TWO if len(genome.models) == 2 else AUTO_OF_MANY
        return (genome.merge_method,) if isinstance(genome.merge_method, str) else genome.merge_method

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """The declarations of the merge methods."""
        return tuple(map(find_method, self.method_names))

    @property
    def method(self) -> MergeMethod:
        """The declaration of the merge method; of the first one if there are several."""
        return self.methods[0]

    def of_method(self, name: str) -> StudyConfig:
        """The study file with one of its methods alone, without the keys that this method lacks."""
        genome, method = self.genome, find_method(name)
        known = {parameter.name for parameter in method.parameters_for(genome.base_model is not None)}
        switches = dict(method.switches)
        own = {
            "merge_method": name,
            "models": self.sources,
            "normalize": genome.normalize if "normalize" in switches else None,
            "rescale": genome.rescale if "rescale" in switches else None,
        }
        ranges = {name: interval for name, interval in self.search.ranges.items() if name in known}
        return self.model_copy(
            update={
                "genome": genome.model_copy(update=own),
                "search": self.search.model_copy(update={"ranges": ranges}),
            }
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """References of the models that get weights.

        Methods on task vectors leave out a base among ``genome.models``: its task vector is zero.
        """
        if all(method.base != "required" for method in self.methods):
            return self.genome.models
        return tuple(model for model in self.genome.models if model != self.genome.base_model)

    @property
    def objectives(self) -> tuple[str, ...]:
        """What is maximised, in the order of the tasks: ``score`` alone unless the goal is ``pareto``."""
        if self.study.goal == "sum":
            return ("score",)
        return tuple(dict.fromkeys(map(self.objective_of, self.tasks)))

    def objective_of(self, task: TaskConfig) -> str:
        """The objective that one of ``tasks`` counts towards with ``goal: pareto``."""
        is_alone = [other.name for other in self.tasks].count(task.name) == 1
        return task.objective or (task.name if is_alone else f"{task.name} ({task.metric})")

    @property
    def dtype(self) -> Dtype | None:
        """The dtype asked for; None: the base model's."""
        return None if self.engine.dtype == "auto" else self.engine.dtype
