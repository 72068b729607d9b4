"""The notes that a study has in the dashboard, in markdown. Knows neither Optuna nor how a note is stored."""

from __future__ import annotations

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.report.summary import Summary, standing
from optuna_merge.report.tables import markdown_table


def study_note(summary: Summary, config: StudyConfig) -> str:
    """What somebody who finds the study in the dashboard should know."""
    genome = config.genome
    tasks = ["| task | weight | metric |", "| --- | ---: | --- |"]
    tasks += [f"| {task.name} | {task.weight:g} | {task.metric} |" for task in config.tasks]
    models = [f"- `{model}`" for model in config.sources]
    models += [f"- base: `{genome.base_model}`"] if genome.base_model else []
    sections = [
        f"# {config.question or summary.study}",
        f"**{standing(summary)}**",
        f"{summary.progress} finished ({summary.state_counts});"
        f" {summary.n_documents:,} documents scored in {summary.seconds / 60:.1f} minutes.",
        "## What is merged",
        f"By `{' or '.join(config.method_names)}`, layer granularity {genome.layer_granularity}:\n\n"
        + "\n".join(models),
        "## What is scored",
        "\n".join(tasks) + "\n\nThe score is the sum of weight x metric.",
        markdown_table(summary).replace("## Results of study", "## Baselines and the best merge: study"),
        "## Commands",
        f"```sh\noptuna-merge run-study {config.path}\noptuna-merge report {config.path}\n"
        f"optuna-merge export {config.path} OUT\n```",
        "A trial with the attribute `baseline` is a source, the base or a uniform merge, scored before the search."
        " A pruned trial scored worse than the best one on the chunks that both were scored on; `paired_estimate`"
        " estimates its full score. The artifacts of a trial are its merge as a mergekit file and the score of every"
        " document.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def best_note(summary: Summary, trial: int, score: float, before: float | None) -> str:
    """What is said about a trial when it becomes the best merge.

    Args:
        summary: The figures of the study.
        trial: Number of the trial.
        score: Its score.
        before: Score of the best merge before it; None if it is the first.
    """
    lead = "" if before is None else f", {score - before:+.4f} against the best one before"
    tasks = next((row.tasks for row in summary.rows if row.trial == trial), {})
    lines = [f"**New best merge: {score:.4f}{lead}.** {standing(summary)}", ""]
    lines += [f"- {name}: {figure.value:.4f}" for name, figure in tasks.items()]
    return "\n".join(lines)
