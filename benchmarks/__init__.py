"""Measurements of speed and search quality. Each file is a script; ``docs/benchmarks.md`` has the results."""
