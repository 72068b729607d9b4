"""Use a merge's score in an Optuna study of your own: your sampler, storage, pruner and objective.

    optuna-merge quickstart --models-only
    python examples/merge_in_your_study.py studies/quickstart.yaml --n-trials 40

The study here prefers small weights: a merge that stays near the base is worth a little accuracy. Its first trial
follows the gradient of the accuracy; all others come from Optuna's sampler. Run the line again to continue with twice
as many trials. The study file says what is merged and scored; its sections ``study`` and ``search.start`` are not used.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import optuna

from optuna_merge import MergeObjective

PENALTY = 0.02  # what a mean weight of 1 costs, in units of accuracy


def main() -> None:
    """Search, and write the best merge as a mergekit file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="study file")
    parser.add_argument("--n-trials", type=int, default=40, metavar="N", help="number of trials to add")
    options = parser.parse_args()

    # A folder of its own for the scores of documents: studies do not share one.
    merge = MergeObjective.from_file(options.file, {"storage_path": "my_optuna_study"})

    def objective(trial: optuna.Trial) -> float:
        accuracy = merge(trial)  # asks the trial for the weights, merges, scores chunk after chunk, and may be pruned
        assert isinstance(accuracy, float)
        trial.set_user_attr("accuracy", accuracy)
        return accuracy - PENALTY * sum(trial.params.values()) / len(trial.params)

    with closing(merge):
        study = optuna.create_study(
            study_name="near the base",
            storage="sqlite:///my_optuna_study.db",
            load_if_exists=True,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=1),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=3),
        )
        merge.ascend(study)  # once: leave it out for a study that only Optuna's sampler searches
        study.optimize(objective, n_trials=options.n_trials)
        best = study.best_trial
        Path("best_merge.yaml").write_text(merge.merge_file(best, study=study))
        print(f"best: {best.value:.4f}, trial {best.number}, accuracy {best.user_attrs['accuracy']:.4f}")
        print("recipe: best_merge.yaml")


if __name__ == "__main__":
    main()
