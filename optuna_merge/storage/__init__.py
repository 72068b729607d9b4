"""An Optuna storage, shared by processes that may be killed at any moment."""
