"""The quickstart's eval tasks, which lm-eval reads from a copy of this folder."""
