"""Dual numbers: numbers that carry their derivatives by other numbers through ordinary arithmetic.

A merge method computes a few numbers from its parameters, and the search computes parameters from those of a trial.
Given dual numbers, the same lines compute the derivatives too. Code that may be given them takes ``exp``, ``sin`` and
``sqrt`` from here. Whatever else asks for a plain float is refused, so no derivative is lost silently.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, cast

from optuna_merge.errors import MethodError


class Dual:
    """A number and its derivatives.

    Comparisons go by the value, except that a dual number equals only itself: a factor of 1 whose derivative is wanted
    must not be left out.

    Attributes:
        value: The number.
        slopes: What it depends on, to its derivative by that.
    """

    __slots__ = ("slopes", "value")

    def __init__(self, value: float, slopes: Mapping[Hashable, float]) -> None:
        self.value = value
        self.slopes = slopes

    def scaled(self, value: float, slope: float) -> Dual:
        """A function of this number, from its value and its derivative by this number."""
        return Dual(value, {key: slope * own for key, own in self.slopes.items()})

    def _with(self, other: Any, value: float, slope: float, other_slope: float) -> Dual:
        slopes = {key: slope * own for key, own in self.slopes.items()}
        if isinstance(other, Dual):
            for key, own in other.slopes.items():
                slopes[key] = slopes.get(key, 0.0) + other_slope * own
        return Dual(value, slopes)

    def __add__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        return self._with(other, self.value + value_of(other), 1.0, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        return self._with(other, self.value - value_of(other), 1.0, -1.0)

    def __rsub__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        return self.scaled(other - self.value, -1.0)

    def __mul__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        factor = value_of(other)
        return self._with(other, self.value * factor, factor, self.value)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        divisor = value_of(other)
        quotient = self.value / divisor
        return self._with(other, quotient, 1 / divisor, -quotient / divisor)

    def __rtruediv__(self, other: Any) -> Dual:
        if not _is_number(other):
            return NotImplemented
        return self.scaled(other / self.value, -other / self.value**2)

    def __neg__(self) -> Dual:
        return self.scaled(-self.value, -1.0)

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self

    def __lt__(self, other: Any) -> bool:
        return self.value < value_of(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > value_of(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= value_of(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= value_of(other)

    def __bool__(self) -> bool:
        return self.value != 0

    def __float__(self) -> float:
        raise MethodError(
            "a method parameter whose derivative is wanted must go through elementwise.write, got a conversion to a"
            " plain float; use optuna_merge.duals for the functions of math, or declare the parameter with"
            " is_smooth=False"
        )

    def __repr__(self) -> str:
        return repr(self.value)


def dual(value: float, key: Hashable) -> float:
    """The number ``value`` with a derivative of 1 by ``key``; typed as what it stands for."""
    return cast(float, Dual(value, {key: 1.0}))


def value_of(number: float) -> float:
    """The plain value of a number that may be dual."""
    given: Any = number
    return given.value if isinstance(given, Dual) else number


def slopes_of(number: float) -> Mapping[Hashable, float]:
    """The derivatives of a number that may be dual; none for a plain one."""
    given: Any = number
    return given.slopes if isinstance(given, Dual) else {}


def with_value(number: float, value: float) -> float:
    """The derivatives of ``number`` with another value, where rounding made one; plain if ``number`` is."""
    return cast(float, Dual(value, slopes_of(number))) if isinstance(cast(Any, number), Dual) else value


def exp(number: float) -> float:
    """``math.exp``."""
    value = math.exp(value_of(number))
    return _mapped(number, value, value)


def sin(number: float) -> float:
    """``math.sin``."""
    return _mapped(number, math.sin(value_of(number)), math.cos(value_of(number)))


def sqrt(number: float) -> float:
    """``math.sqrt``; the derivative at 0 is infinite."""
    value = math.sqrt(value_of(number))
    return _mapped(number, value, 0.5 / value if value else math.inf)


def _mapped(number: Any, value: float, slope: float) -> float:
    return cast(float, number.scaled(value, slope)) if isinstance(number, Dual) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Dual)
