"""``python -m optuna_merge`` is ``optuna-merge``."""

from optuna_merge.cli.app import main

main()
