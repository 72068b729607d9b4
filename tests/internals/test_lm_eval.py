"""What we rely on inside lm-eval: a test that fails names the internal that changed, and what of ours depends on it."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.api.task
import pytest
import yaml
from lm_eval.api.metrics import mean, perplexity
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from optuna_merge.errors import TaskError
from optuna_merge.internals import lm_eval as internals

VERSION = importlib.metadata.version("lm-eval")
N_DOCUMENTS = 4
MakeTask = Callable[..., ConfigurableTask]


def changed(internal: str, user: str) -> str:
    return f"lm-eval {VERSION} changed {internal}, which {user} depends on"


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    def make(**settings: Any) -> ConfigurableTask:
        rows = [{"q": f"{n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(N_DOCUMENTS)]
        (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        task = {
            "task": "tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            **settings,
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
        manager = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
        loaded: ConfigurableTask = manager.load(["tiny"])["tasks"]["tiny"]
        loaded.set_config(key="num_fewshot", value=settings.get("num_fewshot", 0))
        loaded.set_fewshot_seed(seed=1)
        return loaded

    return make


def test_filters_lie_in_an_attribute(make_task: MakeTask) -> None:
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("first", "second")]
    message = changed("Task._filters", "Leaf.metrics, which names metrics by filter,")
    assert internals.filter_names(make_task(filter_list=filters)) == ["first", "second"], message
    assert internals.filter_names(make_task()) == ["none"], message


def test_without_them_it_fails_with_the_version(make_task: MakeTask) -> None:
    task = make_task()
    del task._filters
    with pytest.raises(TaskError) as caught:
        internals.filter_names(task)
    assert str(caught.value) == (
        f"lm-eval {VERSION}: ConfigurableTask._filters must exist, found none; install a version that this package"
        " allows"
    )


def test_filters_run_on_the_instances_that_a_task_holds(make_task: MakeTask) -> None:
    message = changed("Task._instances", "Leaf.score, which filters a chunk's responses,")
    task = make_task()
    task.build_all_requests()
    instances = internals.take_instances(task)
    assert [instance.doc_id for instance in instances] == [0, 0, 1, 1, 2, 2, 3, 3], message
    assert task.instances is None, message
    for number, instance in enumerate(instances[:2]):
        instance.resps = [(float(number), True)]
    internals.apply_filters(task, instances[:2])
    assert [instance.filtered_resps for instance in instances[:2]] == [{"none": (0.0, True)}, {"none": (1.0, True)}]
    assert task.instances is None, message


def test_without_a_place_for_instances_it_fails_with_the_version(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Task, "instances", property(lambda self: ["elsewhere"]))
    with pytest.raises(TaskError, match=rf"lm-eval {VERSION}: ConfigurableTask._instances must exist"):
        internals.take_instances(make_task())


@pytest.mark.parametrize("method", ["doc_to_prefix", "fewshot_context", "construct_requests"])
def test_each_document_goes_through_the_methods_that_are_watched(
    make_task: MakeTask, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = changed(f"when build_all_requests calls Task.{method}", "rendering, which names a document that fails,")
    task = make_task()
    original = getattr(ConfigurableTask, method)
    n_calls = 0

    def fails_on_the_third(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyError("third")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ConfigurableTask, method, fails_on_the_third)
    with pytest.raises(KeyError, match="third"), internals.watch_rendering(task) as rendering:  # noqa: PT012
        assert rendering.doc_id is None
        task.build_all_requests()
    assert (rendering.doc_id, rendering.n_done) == (2, 2), message
    assert not {"doc_to_prefix", "fewshot_context", "construct_requests"} & vars(task).keys()


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize("split", ["test", "train"])
def test_examples_are_drawn_by_a_sampler(make_task: MakeTask, tmp_path: Path, split: str, sampler: str) -> None:
    message = changed("ContextSampler.sample", "rendering, which refuses too many few-shot examples,")
    most = N_DOCUMENTS - (split == "test")
    files = {name: str(tmp_path / "docs.jsonl") for name in ("test", "train")}
    options = {"fewshot_split": split, "fewshot_config": {"sampler": sampler}, "dataset_kwargs": {"data_files": files}}
    task = make_task(num_fewshot=most + 1, **options)
    with pytest.raises(internals.TooFewExamplesError) as caught, internals.watch_rendering(task):
        task.build_all_requests()
    assert (caught.value.n_available, caught.value.asked_excluded) == (most, split == "test"), message
    task = make_task(num_fewshot=most, **options)
    with internals.watch_rendering(task):
        task.build_all_requests()


def test_a_sampler_that_fails_otherwise_says_why_itself(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("broken")

    task = make_task(num_fewshot=1)
    monkeypatch.setattr(task.sampler, "sample", broken)
    with pytest.raises(KeyError, match="broken"), internals.watch_rendering(task):
        task.build_all_requests()


def test_loading_renders_the_first_document(make_task: MakeTask, tmp_path: Path) -> None:
    message = changed("ConfigurableTask.__init__", "Loader, which says why a task cannot be loaded,")
    with pytest.raises(Exception, match="nothing"), internals.watch_loading() as loading:
        make_task(doc_to_text="{{nothing()}}")
    assert (loading.reached_documents, loading.has_no_documents) == (True, False), message
    with pytest.raises(Exception, match="nowhere"), internals.watch_loading() as loading:
        make_task(dataset_kwargs={"data_files": {"test": str(tmp_path / "nowhere")}})
    assert (loading.reached_documents, loading.has_no_documents) == (False, False), message
    (tmp_path / "no_docs.py").write_text("def none(docs):\n    return docs.select([])\n")
    with pytest.raises(IndexError), internals.watch_loading() as loading:  # noqa: PT012
        make_task()
        with (tmp_path / "tiny.yaml").open("a") as file:
            file.write("process_docs: !function no_docs.none\n")
        TaskManager(include_path=[str(tmp_path)], include_defaults=False).load(["tiny"])
    assert loading.has_no_documents, message


def test_the_bar_of_build_all_requests_is_its_modules_tqdm(
    make_task: MakeTask, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task()
    task.build_all_requests()
    assert "4/4" in capfd.readouterr().err, changed("lm_eval.api.task.tqdm", "quietly")
    with internals.without_progress_bar():
        task.build_all_requests()
    assert capfd.readouterr().err == "", changed("lm_eval.api.task.tqdm", "quietly")
    assert lm_eval.api.task.eval_logger.name.startswith("lm_eval"), changed("the name of its logger", "quietly")
    assert logging.getLogger("lm_eval").handlers is not None


def test_a_task_file_is_read_without_its_functions(tmp_path: Path) -> None:
    message = changed("lm_eval.tasks._yaml_loader.load_yaml", "Loader, which says which task file is broken,")
    good, torn = tmp_path / "good.yaml", tmp_path / "torn.yaml"
    good.write_text("task: good\ndoc_to_text: !function not_there.f\n")
    torn.write_text("task: [")
    internals.read_task_file(good)
    with pytest.raises(yaml.YAMLError):
        internals.read_task_file(torn)
    assert {"path", "resolve_func"} <= inspect.signature(internals.load_yaml).parameters.keys(), message


def test_unsafe_and_multimodal_tasks_say_so(make_task: MakeTask) -> None:
    user = "Loader, which refuses such tasks,"
    assert internals.runs_generated_code(make_task(unsafe_code=True)), changed("Task.UNSAFE_CODE", user)
    assert internals.is_multimodal(make_task(doc_to_image=["q"])), changed("Task.MULTIMODAL", user)
    task = make_task()
    assert not internals.runs_generated_code(task)
    assert not internals.is_multimodal(task)


def test_a_model_encodes_context_and_continuation_together() -> None:
    message = changed("TemplateLM._encode_pair", "Language.encode, which makes tokens of requests,")
    assert HFLM._encode_pair is TemplateLM._encode_pair, message

    class Characters:
        backend = "causal"

        def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
            return list(text.encode())

    lm: Any = Characters()
    lm._encode_pair = lambda context, continuation: TemplateLM._encode_pair(lm, context, continuation)
    # a space at the end of the context goes to the continuation
    assert internals.encode_pair(lm, "ab ", "c") == ([97, 98], [32, 99]), message


def test_long_texts_are_cut_into_windows() -> None:
    message = changed("get_rolling_token_windows", "Language.encode, which scores whole texts,")
    windows = internals.get_rolling_token_windows(
        token_list=[1, 2, 3, 4, 5], prefix_token=0, max_seq_len=3, context_len=1
    )
    pairs = [internals.make_disjoint_window(window) for window in windows]
    assert pairs == [([0], [1, 2, 3]), ([2, 3], [4, 5])], message


def test_generation_options_are_normal() -> None:
    message = changed("lm_eval.models.utils", "plan_generation, which says what ends a text,")
    options = internals.normalize_gen_kwargs({"until": ["\n"], "max_gen_toks": 4})
    assert {"do_sample", "max_gen_toks", "until"} <= options.keys(), message
    assert (options["do_sample"], options["max_gen_toks"]) == (False, 4), message
    assert internals.handle_stop_sequences(["a"], "</s>") == ["a", "</s>"], message
    assert internals.maybe_truncate([1, 2, 3, 4], 2, 5, verbose=False) == ([2, 3, 4], 2), message
    assert internals.postprocess_generated_text("one two", ["two"], None) == "one ", message


def test_how_far_back_a_stop_is_looked_for() -> None:
    message = changed("MultiTokenEOSCriteria", "Decoder, which must end a text at the same token,")

    class Characters:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(text.encode())

    assert internals.stop_lookback(Characters(), "abc") == 5, message


def test_numbers_by_which_scores_are_recorded() -> None:
    user = "Scorer, whose scores must equal those that a study recorded,"
    assert (internals.DEFAULT_RANDOM_SEED, internals.DEFAULT_OTHER_SEED) == (0, 1234), changed("its seeds", user)
    assert internals.mean_stderr([0.0, 1.0, 1.0, 0.0]) == pytest.approx(0.5773502691896257 / 2), changed(
        "mean_stderr", user
    )
    assert internals.stderr_for_metric(perplexity, 100) is not None, changed("stderr_for_metric", user)
    assert internals.stderr_for_metric(max, 100) is None, changed("stderr_for_metric", user)
    assert mean([1.0, 2.0]) == 1.5, changed("mean", user)


def test_a_limit_is_a_number_or_a_share(make_task: MakeTask) -> None:
    task, message = make_task(), changed("get_sample_size", "selection, which counts documents,")
    assert internals.get_sample_size(task, None) is None, message
    assert internals.get_sample_size(task, 3) == 3, message
    assert internals.get_sample_size(task, 0.3) == 2, message  # 1.2, rounded up
