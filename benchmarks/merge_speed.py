"""Speed of merging, compared with copying memory and with mergekit's executor on the same checkpoints.

    python benchmarks/merge_speed.py                              four checkpoints of 0.5 B parameters
    python benchmarks/merge_speed.py --n-layers 4 --methods ties  smaller, one method
    python benchmarks/merge_speed.py --no-mergekit --device cuda
    python benchmarks/merge_speed.py --no-mergekit --n-layers 3 --methods all    for the costs in optuna_merge/methods

Methods that decompose matrices are measured on two layers; "first" includes the decompositions.

The checkpoints are random bfloat16, made by the run, and are read once before anything is measured. The copy bandwidth
is measured in the same run: bytes read plus written when the same tensors are copied into the resident model. Each
repeat has other weights and another density, like the trials of a search. "kept" is the time of a merge with the same
density as the merge before. "linear" is the processor time relative to a linear merge of as many models, at least two;
the two are merged by turns. Methods that take fewer models than three merge the first of them.

"MiB" is the memory used beyond the resident model and the mapped files. The run fails above 512, but for methods that
decompose matrices: `check` says what those need. On the CPU it counts anonymous pages, sampled every 5 ms (on Linux
only), because the kernel's own peak counts pages of mapped files too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
import yaml
from safetensors.torch import save_file

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe

N_SOURCES = 3
HIDDEN, INTERMEDIATE, VOCABULARY = 1280, 3456, 32000
DENSITY = 0.5
METHODS_MEASURED = "linear,task_arithmetic,ties,dare_ties,della,breadcrumbs,ram,ramplus_tl,consensus_ta,consensus_ties"
METHODS_THAT_DECOMPOSE = "tsv_m,iso_c"
LAYERS_DECOMPOSED = 2
EXTRA_MIB = 512


def main() -> None:
    args = parse_arguments()
    given = ",".join(METHODS) if args.methods == "all" else args.methods
    decomposing = METHODS_THAT_DECOMPOSE.split(",")
    args.methods = ",".join(method for method in given.split(",") if method not in decomposing)
    measure_all(args)
    args.methods = ",".join(method for method in given.split(",") if method in decomposing)
    args.n_layers = min(args.n_layers, LAYERS_DECOMPOSED)
    measure_all(args)


def measure_all(args: argparse.Namespace) -> None:
    """Write models of ``args.n_layers`` layers and measure ``args.methods`` on them, if there are any."""
    if args.methods:
        with tempfile.TemporaryDirectory() as folder:
            run(args, [str(path) for path in write_models(Path(folder), args.n_layers)])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-layers", type=int, default=21)
    parser.add_argument("--methods", default=f"{METHODS_MEASURED},{METHODS_THAT_DECOMPOSE}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def run(args: argparse.Namespace, references: list[str]) -> None:
    keep_in = Path(references[0]).parent / "matrices"
    merger = Merger({r: Checkpoint.open(r) for r in references}, device=args.device, keep_in=keep_in)
    resident = {
        name: torch.empty(merger.checkpoints[references[0]].shape(name), dtype=torch.bfloat16, device=args.device)
        for name in merger.names
    }
    n_elements = sum(tensor.numel() for tensor in resident.values())
    copy_all(merger, resident)  # fills the page cache
    copy_s = statistics.median(seconds_of(lambda: copy_all(merger, resident)) for _ in range(args.repeats))
    bandwidth = 2 * 2 * len(references) * n_elements / copy_s
    print(f"{len(references)} checkpoints of {n_elements / 1e6:.0f} M parameters, {torch.get_num_threads()} threads")
    print(f"copying: {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'method':18}{'first s':>9}{'s':>9}{'kept s':>9}{'linear':>8}{'GB/s':>7}{'of copy':>9}"
        f"{'mergekit s':>12}{'times':>7}{'MiB':>7}"
    )
    for method in args.methods.split(","):
        # methods share what a merger remembers
        merger = Merger({r: Checkpoint.open(r) for r in references}, device=args.device, keep_in=keep_in)
        measure(args, method, references, merger, resident, bandwidth)


def measure(
    args: argparse.Namespace,
    method: str,
    references: list[str],
    merger: Merger,
    resident: dict[str, torch.Tensor],
    bandwidth: float,
) -> None:
    """Measure one method and print its line."""
    n_elements = sum(tensor.numel() for tensor in resident.values())
    recipes = [make_recipe(method, references, args.n_layers, DENSITY - 0.001 * i, i) for i in range(args.repeats + 1)]
    with ExtraMemory(args.device) as memory:
        n_linear = max(2, len(recipes[0].models))
        times, cpu, linear_cpu = [], [], []
        for number, recipe in enumerate(recipes):
            linear = make_recipe("linear", references[: 1 + n_linear], args.n_layers, DENSITY, 10 + number)
            clock = time.process_time()
            merge_all(merger, linear, resident)
            linear_cpu.append(time.process_time() - clock)
            times.append(seconds_of(lambda recipe=recipe: merge_all(merger, recipe, resident)))
            cpu.append(time.process_time() - clock - linear_cpu[-1])
        kept = make_recipe(method, references, args.n_layers, DENSITY - 0.001 * args.repeats, -1)
        kept_s = seconds_of(lambda: merge_all(merger, kept, resident))
    seconds = statistics.median(times[1:])
    of_linear = statistics.median(cpu[1:]) / statistics.median(linear_cpu[1:])
    n_read = len(recipes[0].models) + (METHODS[method].base == "required")
    speed = 2 * (n_read + 1) * n_elements / seconds  # kept float32 matrices count as the sources they stand for
    has_peer = args.mergekit and METHODS[method].in_mergekit
    theirs = seconds_of(lambda: run_mergekit(recipes[0])) if has_peer else float("nan")
    print(
        f"{method:18}{times[0]:9.2f}{seconds:9.2f}{kept_s:9.2f}{of_linear:8.1f}{speed / 1e9:7.1f}"
        f"{speed / bandwidth:9.0%}{theirs:12.2f}{theirs / seconds:7.1f}{memory.peak_mib:7.0f}",
        flush=True,
    )
    decomposes = method in METHODS_THAT_DECOMPOSE.split(",")
    assert decomposes or memory.peak_mib <= EXTRA_MIB, f"{method}: {memory.peak_mib:.0f} MiB beyond model and files"


def write_models(folder: Path, n_layers: int) -> list[Path]:
    """Write a base and its fine-tunes, with Llama's shapes."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(n_layers):
        for part in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = (HIDDEN, HIDDEN)
        mlp = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
        for part, shape in mlp.items():
            shapes[f"model.layers.{layer}.mlp.{part}_proj.weight"] = shape
        for part in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{part}_layernorm.weight"] = (HIDDEN,)
    base = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    paths = []
    for number in range(N_SOURCES + 1):
        spread = 0.002 if number else 0.0
        tensors = {name: (tensor + spread * torch.randn(tensor.shape)).bfloat16() for name, tensor in base.items()}
        path = folder / f"model_{number}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": n_layers,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_attention_heads": 10,
            "vocab_size": VOCABULARY,
        }
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def make_recipe(method: str, references: list[str], n_layers: int, density: float, number: int) -> Recipe:
    """The merge of one trial. Each ``number`` has other weights, because equal merges are not written again."""
    declared = METHODS[method]
    base = references[0] if declared.base in ("required", "unused") else None
    most = declared.n_models_for(base is not None)[1]
    sources = references[1:][:most]
    values = {"weight": (0.37 + 0.001 * number, 0.91, 0.22)[: len(sources)], "density": (density,) * len(sources)}
    applied = declared.parameters_for(base is not None)
    per_model = {p.name: values[p.name] for p in applied if p.per_model and p.name in values}
    change = 1 + 0.001 * number
    varied = {"lambda": change, "epsilon": 1e-3 * change, "t": 0.4 * change, "select_topk": 0.5 * change}
    varied |= {"tol": 1e-5 * change}
    varied = {} if "weight" in per_model else varied
    shared = {p.name: varied[p.name] for p in applied if not p.per_model and p.name in varied}
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(None, shared, per_model),))
    return Recipe(method, tuple(sources), base, n_layers, (group,), dtype="bfloat16")


def seconds_of(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_all(merger: Merger, resident: dict[str, torch.Tensor]) -> None:
    for name, tensor in resident.items():
        for checkpoint in merger.checkpoints.values():
            tensor.copy_(checkpoint.get(name))


def merge_all(merger: Merger, recipe: Recipe, resident: dict[str, torch.Tensor]) -> None:
    for _ in merger.merge(recipe, out=resident.get):
        pass


def run_mergekit(recipe: Recipe) -> None:
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    config = MergeConfiguration.model_validate(yaml.safe_load(to_mergekit(recipe)) | {"dtype": "bfloat16"})
    options = MergeOptions(quiet=True)
    LoaderCache().setup(options=options)
    model_config = config.referenced_models()[0].config()
    planner = MergePlanner(config, get_architecture_info(config, options), options, model_config)
    planner._plan()  # plan_in_memory wraps these tasks once more, which fails with pydantic 2.12
    for _ in Executor([task for _, task in planner._tensors], math_device="cpu", storage_device="cpu").run(quiet=True):
        pass


class ExtraMemory:
    """Peak of the memory used in a ``with`` block beyond what was used before it."""

    def __init__(self, device: str) -> None:
        self.peak_mib = 0.0
        self._is_cuda = device.startswith("cuda")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> ExtraMemory:
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = anonymous_bytes()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_cuda:
            self._note(torch.cuda.max_memory_allocated())
        else:
            self._is_over.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            self._note(anonymous_bytes())

    def _note(self, n_bytes: int) -> None:
        self.peak_mib = max(self.peak_mib, (n_bytes - self._before) / 2**20)


def anonymous_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
