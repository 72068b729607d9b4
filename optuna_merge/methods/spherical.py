"""Methods that mix models along arcs: slerp, nuslerp, multislerp and the Karcher mean; and model stock.

Each result is a linear combination of whole tensors whose coefficients follow from their inner products. So a first
pass computes the inner products, a few numbers become the coefficients, and a second pass combines the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optuna_merge.duals import sin, sqrt
from optuna_merge.errors import MethodError
from optuna_merge.methods.choice import slerp_choice
from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.sparsifier import Sums, dot

Products = list[list[float]]
"""Inner products of all pairs of tensors: a symmetric matrix."""


def slerp(inputs: MergeInput, out: Tensor) -> None:
    """Write a point of the arc between two tensors.

    With a base, the arc leads from the base (``t`` = 0) to the one model (``t`` = 1). Without, it leads between the two
    models of the highest ``weight``, as in mergekit-evolve: ``t`` is the second's softmax share, so the point is closer
    to the first. Nearly parallel tensors are mixed linearly.

    References:
        Shoemake, Animating rotation with quaternion curves, 1985.
    """
    n_wanted = 2 if inputs.base is None else 1
    if len(inputs.models) < n_wanted or (inputs.base is not None and len(inputs.models) > 1):
        rule = "two or more models, or a base and one model"
        raise MethodError(f"{inputs.name}: slerp must have {rule}, got {len(inputs.models)}; add or remove some")
    if inputs.base is not None:
        first, second, t = inputs.base, inputs.models[0], inputs.shared["t"]
    else:
        chosen, t = slerp_choice(inputs.per_model["weight"])
        first, second = (inputs.models[index] for index in chosen)
    pair = inputs.of(base=None, models=(first, second))
    (aa, ab), (_, bb) = products(pair)
    norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    cosine = _clamped(ab / (norms[0] * norms[1]))
    combine(pair, _arc(t, cosine, is_straight=abs(cosine) > 0.9995), out)


def nuslerp(inputs: MergeInput, out: Tensor) -> None:
    """Write a point of the arc between two models, or between their task vectors if there is a base.

    The position is the second's share of the ``weight``, or one half if the weights sum to 0.
    """
    weights = inputs.per_model["weight"]
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    (aa, ab), (_, bb) = products(inputs)
    cosine = _clamped(ab / (max(math.sqrt(aa), 1e-7) * max(math.sqrt(bb), 1e-7)))
    combine(inputs, _arc(t, cosine, is_straight=1 - cosine**2 <= 1e-16), out)


def multislerp(inputs: MergeInput, out: Tensor) -> None:
    """Write the weighted mean direction of the models, or of their task vectors, at their weighted mean norm.

    Raises:
        MethodError: If the weighted directions of more than two models cancel; as in mergekit, not if all are zero.

    References:
        mergekit's multislerp. We leave out its step in the tangent space, which is zero at the mean.
    """
    weights = inputs.per_model["weight"]
    if len(weights) == 1:
        combine(inputs, [1.0], out)
        return
    if inputs.switches["normalize_weights"]:
        total = sum(weights)
        weights = tuple(weight / total if total else math.nan for weight in weights)
    gram = products(inputs)
    norms = [math.sqrt(row[index]) for index, row in enumerate(gram)]
    shares = [weight / (norm + 1e-8) for weight, norm in zip(weights, norms, strict=True)]
    mean_norm = _norm(shares, gram)
    if mean_norm < 1e-8:
        if len(weights) > 2 and max(norms) > 1e-8:
            raise MethodError(f"{inputs.name}: the weighted directions of the models must not cancel")
        combine(inputs, weights, out)
        return
    scale = sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / mean_norm
    combine(inputs, [share * scale for share in shares], out)


def karcher(inputs: MergeInput, out: Tensor) -> None:
    """Write the Karcher mean of the models' directions, at their mean norm.

    References:
        arXiv:2603.04972; Karcher, Riemannian center of mass and mollifier smoothing, 1977.
    """
    tolerance, n_models = inputs.shared["tol"], len(inputs.models)
    gram = products(inputs)
    norms = [math.sqrt(row[index]) for index, row in enumerate(gram)]
    used = [index for index, norm in enumerate(norms) if norm > tolerance]
    if n_models == 1 or not used:
        combine(inputs, [float(n_models == 1)] * n_models, out)
        return
    cosines = [[gram[i][j] / (norms[i] * norms[j]) for j in used] for i in used]
    mean = [1 / len(used)] * len(used)  # coefficients of the unit tensors
    length = _norm(mean, cosines)
    mean = [m / length for m in mean] if length >= tolerance else [1.0, *[0.0] * (len(used) - 1)]
    for _ in range(int(inputs.shared["max_iter"])):
        tangent = [0.0] * len(used)
        for i, row in enumerate(cosines):
            cosine = _clamped(sum(m * c for m, c in zip(mean, row, strict=True)))
            angle = math.acos(cosine)
            if angle < tolerance:
                continue
            factor = angle / math.sin(angle) / len(used) if math.sin(angle) else math.nan
            tangent = [t - factor * cosine * m for t, m in zip(tangent, mean, strict=True)]
            tangent[i] += factor
        step = _norm(tangent, cosines)
        if step < tolerance:
            break
        mean = [math.cos(step) * m + math.sin(step) / step * t for m, t in zip(mean, tangent, strict=True)]
        length = _norm(mean, cosines)
        mean = [m / length for m in mean] if length > tolerance else mean
    scale = sum(norms) / n_models
    coefficients = [0.0] * n_models
    for index, m in zip(used, mean, strict=True):
        coefficients[index] = scale * m / norms[index]
    combine(inputs, coefficients, out)


def model_stock(inputs: MergeInput, out: Tensor) -> None:
    """Write a point between the base and the mean of the models, closer to the base if the models spread more.

    References:
        Model Stock, arXiv:2403.19522, equation 3, with the mean cosine over all pairs of a tensor's task vectors.
    """
    gram = products(inputs)
    n_models = len(gram)
    cosines = [
        _clamped(gram[i][j] / max(math.sqrt(gram[i][i] * gram[j][j]), 1e-6))
        for i in range(n_models)
        for j in range(i + 1, n_models)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (n_models - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else n_models * cosine / divisor
    combine(inputs, [t / n_models] * n_models, out)


def products(inputs: MergeInput) -> Products:
    """Inner products of the models, or of their task vectors if there is a base, whatever the number of threads."""
    n_models = len(inputs.models)
    parts = {(i, j): Sums() for i in range(n_models) for j in range(i, n_models)}
    for block in inputs.blocks():
        directions = [
            torch.clone(block.direction(index), memory_format=torch.contiguous_format) for index in range(n_models)
        ]
        for (i, j), sums in parts.items():
            sums.add(dot(directions[i], directions[j]))
    totals = {pair: sums.total() for pair, sums in parts.items()}
    return [[totals[min(i, j), max(i, j)] for j in range(n_models)] for i in range(n_models)]


def combine(inputs: MergeInput, coefficients: Sequence[float], out: Tensor) -> None:
    """Write ``sum_i coefficient_i direction_i``, plus the base if there is one; or add to the input's slope."""
    if inputs.slope is not None:
        slopes = torch.zeros(len(coefficients), dtype=torch.float64, device=inputs.device)
        for block in inputs.blocks():
            gradient = inputs.slope.gradient(block.span)
            for index in range(len(coefficients)):
                slopes[index] += dot(gradient, block.direction(index).contiguous()).sum()
        inputs.slope.add(coefficients, slopes)
        return
    flat = out.view(-1)
    for chunk in inputs.chunks():
        total = chunk.zeros("total")
        for index, coefficient in enumerate(coefficients):
            total.add_(chunk.direction(index), alpha=coefficient)
        flat[chunk.span] = total if inputs.base is None else torch.add(chunk.base, total, out=total)


def _arc(t: float, cosine: float, *, is_straight: bool) -> tuple[float, float]:
    """Coefficients of two tensors for the point ``t`` of the arc between them."""
    if is_straight:
        return 1 - t, t
    angle = math.acos(cosine)
    return sin((1 - t) * angle) / math.sin(angle), sin(t * angle) / math.sin(angle)


def _norm(coefficients: Sequence[float], gram: Products) -> float:
    square = sum(a * b * gram[i][j] for i, a in enumerate(coefficients) for j, b in enumerate(coefficients))
    return sqrt(max(square, 0.0))


def _clamped(cosine: float) -> float:
    return min(1.0, max(-1.0, cosine))
