"""Makes checkpoints mergeable tensor by tensor: gives them the same parts, output heads and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.compare import check_compatible
from optuna_merge.checkpoints.output_heads import untie
from optuna_merge.checkpoints.senses import complete
from optuna_merge.checkpoints.vocabulary import align


def unify(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None) -> dict[str, Checkpoint]:
    """Views of checkpoints that can be merged tensor by tensor.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: See :func:`.vocabulary.align`.

    Returns:
        The same references; a checkpoint that needs no change is returned as it is.

    Raises:
        CheckpointError: If they differ in more than vocabularies, ties and in what only one of them sees or hears.
    """
    untied = untie(complete(checkpoints, tokenizer_source))
    check_compatible(list(untied.values()), tokenizer_source)
    return align(untied, tokenizer_source)
