"""Eval tasks and the engines that answer their requests. Nothing here knows of Optuna."""
