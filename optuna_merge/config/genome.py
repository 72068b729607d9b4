"""The section ``genome``: what is merged.

Knows the keys; does not know which of them a merge method takes, see ``contradictions``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from optuna_merge.config.section import YAML_LIST, Section


def _one_or_several(value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return value[0] if len(value) == 1 else tuple(value)
    if not isinstance(value, str):
        raise ValueError("a merge method or a list of them")
    return value


class GenomeConfig(Section):
    """What is merged: the keys of mergekit-evolve's ``genome``.

    Attributes:
        models: References of the sources: folders (relative to the study file) or hub names; ``@revision`` is allowed.
        merge_method: A name in ``optuna_merge.methods.METHODS``, or the import path of a ``MergeMethod``; several of
            these, which are raced against each other; or ``auto``, which races methods that suit the models.
        base_model: Reference of the common ancestor.
        tokenizer_source: Whose tokens the merged model has if vocabularies differ: ``base``, ``union`` or one of the
            models.
        layer_granularity: Layers in a layer group; 0: one group. Need not divide the number of layers.
        allow_negative_weights: Let the default range of ``weight`` go below 0.
        normalize: Divide by the sum of weights; None: the method's default.
        rescale: Scale up what a sparsifying method keeps, to make up for the dropped entries; None: the method's
            default.
        smooth: Interpolate between the values of the layer groups across depth instead of stepping.
        filters: Parts of tensor names. The tensors of each part have parameters of their own; so have all the others.
    """

    models: Annotated[tuple[str, ...], YAML_LIST, Field(min_length=1)]
    merge_method: Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)]
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = Field(0, ge=0)
    allow_negative_weights: bool = False
    normalize: bool | None = None
    rescale: bool | None = None
    smooth: bool = False
    filters: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], YAML_LIST] = ()
