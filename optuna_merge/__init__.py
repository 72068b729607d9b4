"""Evolutionary merging of language models as an Optuna study."""
