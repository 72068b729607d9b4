"""Tiny checkpoints, a fake engine and conformance classes."""
