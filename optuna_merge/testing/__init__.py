"""Tiny checkpoints, a fake engine and conformance classes, for tests here and in packages that extend this one."""

from optuna_merge.testing.conformance import EngineConformance, MethodConformance, TextRequest
from optuna_merge.testing.engine import FakeEngine, FakePrepared
from optuna_merge.testing.methods import merge_tensors
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

__all__ = [
    "EngineConformance",
    "FakeEngine",
    "FakePrepared",
    "MethodConformance",
    "TextRequest",
    "TinyArchitecture",
    "merge_tensors",
    "write_tiny_models",
]
