"""Eval tasks scored on the weights that an engine holds. ``engine.py`` is the seam to the engines."""
