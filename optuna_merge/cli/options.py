"""The options of ``run-study``, which every command over a study file takes, and what they lead to.

``StudyArguments`` is the table of these options; ``takes_study`` gives a command all of them. So a user can repeat a
line of ``run-study`` with another verb. Knows which key of the study file an option replaces; does not know what a
command does.
"""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import MISSING, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from optuna_merge.errors import OptunaMergeError

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config.study_config import StudyConfig

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C."""

Html = Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Also write an HTML page with pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_SEARCH, _ENGINE, _STORAGE, _TRACKERS = "Search", "Engine", "Storage", "Trackers"
"""The groups of options in a command's help."""

_Strategy = Literal["pool", "buffered", "serial"]


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """A study file and the options of ``run-study``, as given on the command line.

    The annotations are what typer reads. Relative paths start at the working directory.
    """

    file: Annotated[Path, typer.Argument(metavar="FILE", help="Study file (YAML), such as studies/quickstart.yaml.")]
    n_trials: Annotated[
        int | None,
        typer.Option(
            "--n-trials",
            "--max-fevals",
            metavar="N",
            help="Total number of trials, with baselines and earlier runs.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    storage_path: Annotated[
        Path | None,
        typer.Option(
            "--storage-path",
            metavar="DIR",
            help="Folder for everything that the study writes.",
            rich_help_panel=_STORAGE,
        ),
    ] = None
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="URL",
            help="Optuna storage; default: an SQLite file in that folder.",
            rich_help_panel=_STORAGE,
        ),
    ] = None
    task_search_path: Annotated[
        list[Path] | None,
        typer.Option(
            "--task-search-path",
            metavar="DIR",
            help="Folder with eval tasks; repeat it for several folders.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Device to score on: auto, cpu, cuda or cuda:<index>.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Number of processes here that run the study together.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="LIST",
            help="One worker on each device, such as cuda:0,cuda:1.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    num_gpus: Annotated[
        int | None,
        typer.Option(
            "--num-gpus", min=1, metavar="N", help="One worker on each of the first N GPUs.", rich_help_panel=_ENGINE
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            help="Sequences in one forward pass, if all are as long as the longest.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    sigma0: Annotated[
        float | None,
        typer.Option(
            "--sigma0",
            metavar="X",
            help="Initial step size of CMA-ES, as a fraction of each range.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    force_population_size: Annotated[
        int | None,
        typer.Option(
            "--force-population-size", metavar="N", help="Trials in a generation of CMA-ES.", rich_help_panel=_SEARCH
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--random-seed",
            "--seed",
            metavar="N",
            help="Seed of everything random in the study.",
            rich_help_panel=_SEARCH,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="S", help="Start no new trial after this many seconds.", rich_help_panel=_SEARCH
        ),
    ] = None
    merge_cuda: Annotated[
        bool | None,
        typer.Option(
            "--merge-cuda/--no-merge-cuda",
            help="Merge on the GPU or on the CPU; default: where it is scored.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    vllm: Annotated[
        bool | None,
        typer.Option("--vllm/--no-vllm", help="Score with vLLM, or with transformers.", rich_help_panel=_ENGINE),
    ] = None
    load_in_8bit: Annotated[
        bool,
        typer.Option(
            "--load-in-8bit", help="Let vLLM quantize each merge to 8 bits (fp8), on a GPU.", rich_help_panel=_ENGINE
        ),
    ] = False
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit", help="Let vLLM quantize each merge to 4 bits (mxfp4), on a GPU.", rich_help_panel=_ENGINE
        ),
    ] = False
    wandb: Annotated[
        bool,
        typer.Option(
            "--wandb/--no-wandb",
            help="Log to Weights & Biases; WANDB_MODE=offline works too.",
            rich_help_panel=_TRACKERS,
        ),
    ] = False
    wandb_project: Annotated[
        str,
        typer.Option("--wandb-project", metavar="NAME", help="Weights & Biases project.", rich_help_panel=_TRACKERS),
    ] = "optuna-merge"
    wandb_entity: Annotated[
        str | None,
        typer.Option(
            "--wandb-entity", metavar="NAME", help="Weights & Biases user or team.", rich_help_panel=_TRACKERS
        ),
    ] = None
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            "--tracker",
            metavar="PATH",
            help="Log to mlflow, or to an optuna_merge.Tracker of your own, such as my_package.MyTracker; repeatable.",
            rich_help_panel=_TRACKERS,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(
            "--trust-remote-code/--no-trust-remote-code",
            help="Run, or refuse, the Python code that comes with a model.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    allow_benchmark_tasks: Annotated[
        bool,
        typer.Option(
            "--i-understand-the-depths-of-the-evils-i-am-unleashing",
            help="Allow the tasks of known benchmarks (allow_benchmark_tasks: true).",
            rich_help_panel=_SEARCH,
        ),
    ] = False
    save_final_model: Annotated[
        bool,
        typer.Option(
            "--save-final-model/--no-save-final-model",
            help="At the end, export the best merge as final_model in the storage path.",
            rich_help_panel=_STORAGE,
        ),
    ] = False
    strategy: Annotated[_Strategy | None, typer.Option("--strategy", "-s")] = None
    in_memory: Annotated[bool | None, typer.Option("--in-memory/--no-in-memory")] = None
    reshard: Annotated[bool | None, typer.Option("--reshard/--no-reshard")] = None
    allow_crimes: Annotated[bool | None, typer.Option("--allow-crimes/--no-allow-crimes")] = None
    as_json: Json = False

    def load(self) -> StudyConfig:
        """The study file, with what the options replace in it.

        Raises:
            ConfigError: If the study file cannot be used.
            OptunaMergeError: If options contradict each other.
        """
        from optuna_merge.config.read import load_study

        return load_study(self.file, self.overrides())

    def open(self) -> tuple[StudyConfig, optuna.Study]:
        """The study file, as :meth:`load` reads it, and its study, which must have been started.

        Raises:
            ConfigError: If the study file cannot be used.
            StudyError: If the study has not been started.
            OptunaMergeError: If options contradict each other.
        """
        config = self.load()
        return config, open_started(config)

    def overrides(self) -> dict[str, Any]:
        """What the options replace in the study file: dotted key to value.

        Raises:
            ConfigError: If the study file cannot be used.
            OptunaMergeError: If options contradict each other.
        """
        from optuna_merge.config.read import load_study

        given = self.plain_overrides()
        if len(self.worker_devices()) == 1 and self._quantization() is None:
            return given
        config = load_study(self.file, given)
        return given | self.engine_overrides(config.engine.backend, config.study.n_workers)

    def plain_overrides(self) -> dict[str, Any]:
        """What the options replace, whatever the study file says.

        Raises:
            OptunaMergeError: If options contradict each other.
        """
        from optuna_merge.config.paths import absolute_storage

        on = self.worker_devices()
        given = {
            "storage_path": self.storage_path and self.storage_path.absolute(),
            "task_search_path": [path.absolute() for path in self.task_search_path or ()] or None,
            "allow_benchmark_tasks": self.allow_benchmark_tasks or None,
            "study.n_trials": self.n_trials,
            "study.storage": self.storage and absolute_storage(self.storage, Path.cwd()),
            "study.seed": self.seed,
            "study.timeout": self.timeout,
            "study.sampler.sigma0": self.sigma0,
            "study.sampler.popsize": self.force_population_size,
            "engine.device": on[0],
            "engine.batch_size": self.batch_size,
            "engine.trust_remote_code": self.trust_remote_code,
            "engine.backend": {True: "vllm", False: "hf", None: None}[self.vllm],
            "engine.merge_device": self._merge_device(on[0]),
        }
        return {key: value for key, value in given.items() if value is not None}

    def engine_overrides(self, backend: str, n_workers: int) -> dict[str, Any]:
        """What the options replace besides, depending on what the study file says with :meth:`plain_overrides`.

        Args:
            backend: Its ``engine.backend``.
            n_workers: Its ``study.n_workers``.

        Raises:
            OptunaMergeError: If options contradict each other or the engine.
        """
        on, quantization = self.worker_devices(), self._quantization()
        given: dict[str, Any] = {}
        if quantization is not None and backend != "vllm":
            raise OptunaMergeError(
                f"--load-in-{8 if self.load_in_8bit else 4}bit must be given for vLLM, got the transformers engine,"
                " which has no quantized weights; add --vllm, or leave the option out and use a larger GPU"
            )
        if quantization is not None:
            given["engine.vllm.quantization"] = quantization
        if len(on) > 1:
            given["study.n_workers"] = max(len(on), n_workers)
            if backend == "vllm" and on[0] is not None and on[0].startswith("cuda"):
                given["engine.device"] = "auto"  # each worker sees one GPU
        return given

    def worker_devices(self) -> list[str | None]:
        """The device of each process that runs the study; None for the study file's.

        Raises:
            OptunaMergeError: If options contradict each other.
        """
        choices = {"--device": self.device, "--devices": self.devices, "--num-gpus": self.num_gpus}
        given = [option for option, value in choices.items() if value is not None]
        if len(given) > 1:
            raise OptunaMergeError(f"{given[0]} must be given alone, got {given[1]} too; leave one of them out")
        if self.num_gpus is not None:
            names: list[str | None] = [f"cuda:{index}" for index in range(self.num_gpus)]
        elif self.devices is not None:
            names = [*_parse_devices(self.devices)]
        else:
            names = [self.device]
        return [*islice(cycle(names), self.workers or len(names))]

    def needless(self) -> list[str]:
        """A line for each given option of mergekit-evolve that changes nothing here; says why."""
        reasons = {
            f"--strategy {self.strategy}": (
                self.strategy is not None,
                "each worker takes the next trial as soon as it is free; --workers, --devices and --num-gpus set how"
                " many there are",
            ),
            "--no-in-memory": (self.in_memory is False, "a merge is written straight into the model that is scored"),
            "--reshard": (self.reshard is True, "tensors are read from the models' own files, in shards or not"),
            "--allow-crimes": (self.allow_crimes is True, "models of different architectures are refused"),
        }
        return [f"{option} has no effect: {reason}" for option, (is_given, reason) in reasons.items() if is_given]

    def remaining(self) -> list[str]:
        """The given options that no key of a study file can say, as they are written on a command line."""
        values = {
            "--workers": self.workers,
            "--devices": self.devices,
            "--num-gpus": self.num_gpus,
            **({"--wandb-project": self.wandb_project, "--wandb-entity": self.wandb_entity} if self.wandb else {}),
        }
        flags = {"--wandb": self.wandb, "--save-final-model": self.save_final_model}
        line = [option for option, is_given in flags.items() if is_given]
        line += [part for option, value in values.items() if value is not None for part in (option, str(value))]
        return line + [part for path in self.tracker or () for part in ("--tracker", path)]

    def next_line(self, command: str, *own: str) -> str:
        """The command line of another command for the study that was run with these options.

        Args:
            command: Such as ``export``.
            own: What follows the study file, such as ``OUT``.
        """
        options = {"--storage-path": self.storage_path, "--storage": self.storage, "--random-seed": self.seed}
        given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
        code = ["--trust-remote-code"] if self.trust_remote_code else []
        return shlex.join(["optuna-merge", command, str(self.file), *own, *given, *code])

    def _merge_device(self, device: str | None) -> str | None:
        if self.merge_cuda is None:
            return None
        if not self.merge_cuda:
            return "cpu"
        return "auto" if device is not None and device.startswith("cuda") else "cuda"  # each worker on its own GPU

    def _quantization(self) -> str | None:
        if self.load_in_8bit and self.load_in_4bit:
            raise OptunaMergeError("--load-in-8bit must be given alone, got --load-in-4bit too; leave one of them out")
        return "fp8" if self.load_in_8bit else "mxfp4" if self.load_in_4bit else None


_NAMES = [field.name for field in fields(StudyArguments)]
_HIDDEN = {"strategy", "in_memory", "reshard", "allow_crimes"}
ALL = frozenset(_NAMES) - _HIDDEN
"""Every field of ``StudyArguments``, except options of mergekit-evolve that change nothing here."""


def takes_study(
    shown: Collection[str], file: Any = None, default: Path | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a study file and all options of ``run-study``, as the ``StudyArguments`` that it takes first.

    Args:
        shown: Fields of ``StudyArguments`` that the command's help lists. The others are accepted, too.
        file: What typer reads as the study file instead of an argument.
        default: The study file if the command line names none; None: it must.
    """
    hints = get_type_hints(StudyArguments, include_extras=True)
    if file is not None:
        hints["file"] = file
    first, *shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=(default or inspect.Parameter.empty) if field.default is MISSING else field.default,
            annotation=hints[field.name] if field.name in {"file", *shown} else _hidden(hints[field.name]),
        )
        for field in fields(StudyArguments)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in _NAMES}
            command(StudyArguments(**given), **values)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([first, *keywords, *shared])
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        vars(run)["__signature__"] = signature  # typer reads it
        return run

    return decorate


def _hidden(annotation: Any) -> Any:
    """The annotation of an option that help does not list."""
    kind, option = get_args(annotation)
    option = copy(option)
    option.hidden = True
    return Annotated[kind, option]


def open_started(config: StudyConfig) -> optuna.Study:
    """The study of a study file, which must have been started.

    Raises:
        StudyError: If the study has not been started.
    """
    import optuna

    from optuna_merge.storage.open import open_study, storage_url

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # our own lines say the same
    return open_study(storage_url(config.storage_path, config.study.storage), config.study.name)


def _parse_devices(devices: str) -> list[str]:
    names = [name.strip() for name in devices.split(",")]
    if not all(names):
        raise OptunaMergeError(f"--devices must be names separated by commas, got {devices!r}; try cuda:0,cuda:1")
    return names
