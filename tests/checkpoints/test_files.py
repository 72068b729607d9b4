from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optuna_merge.checkpoints.files import TensorFiles, read_json, write_json
from optuna_merge.errors import CheckpointError


def test_several_files_are_one_set_of_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.arange(4, dtype=torch.bfloat16), "c": torch.zeros(())}
    save_file({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "1")
    save_file({"c": tensors["c"]}, tmp_path / "2")
    files = TensorFiles([tmp_path / "1", tmp_path / "2"], "it")
    assert set(files.names) == set(tensors)
    assert all(torch.equal(files.get(name), tensor) for name, tensor in tensors.items())
    assert (files.shape("a"), files.dtype("b")) == ((2, 3), torch.bfloat16)
    save_file(tensors, tmp_path / "whole")
    assert TensorFiles([tmp_path / "whole"], "other").digest == files.digest
    save_file(tensors | {"a": torch.ones(3, 2)}, tmp_path / "changed")
    assert TensorFiles([tmp_path / "changed"], "other").digest != files.digest
    with pytest.raises(CheckpointError, match="it: has no tensor named d"):
        files.get("d")


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"file: must be a whole safetensors file, got: .*; fetch it again"):
        TensorFiles([tmp_path / "file"], "it")


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels do not keep to a limit on the address space")
def test_a_file_that_the_kernel_does_not_map(tmp_path: Path) -> None:
    n = 64 << 30
    header = json.dumps({"a": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}).encode()
    with (tmp_path / "file").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + n)  # a hole: takes no room
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (8 << 30), limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"file: must be of a size .* can map .*; save .* shards"):
            TensorFiles([tmp_path / "file"], "it")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_json_objects_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": "é"})
    assert read_json(file) == {"a": "é"}
    assert "é" in file.read_text(encoding="utf-8")
    file.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"x.json: must hold a JSON object, got list"):
        read_json(file)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"x.json: must be readable JSON, got .*; fetch the model again"):
        read_json(file)
