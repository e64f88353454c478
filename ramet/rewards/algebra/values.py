"""Numerical equality of expressions: both are computed to sixty digits or more at fixed values of the variables, in bounded time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from mpmath import MPContext

from ramet.errors import NotationError
from ramet.rewards.algebra.trees import Node, Num, Op, Quantity, Sym, inside, number_of, symbols_of, written

_POINTS = 4
_DIGITS = 60
_LARGEST = 10**9
_MOST_DIGITS = 5000
_CONTEXT = MPContext()
_LOCK = threading.Lock()  # of the context, whose working precision is a global state


def equal_values(a: Node, b: Node, error: float | None = None) -> bool:
    """Whether two expressions are equal at every point, to the working precision or within a relative `error`.

    The precision is chosen so that the smallest term of a sum still counts beside the largest (`2^{2017} - 1`); if that takes
    more than `_MOST_DIGITS`, expressions are equal if they are written alike.
    """
    digits = max(_DIGITS, 30 + max(_longest(a), _longest(b)))
    points = _POINTS if symbols_of(a) | symbols_of(b) else 1
    with _LOCK:
        return all(_equal_at(point, a, b, digits, error) for point in range(points))


def _equal_at(point: int, a: Node, b: Node, digits: int, error: float | None) -> bool:
    _CONTEXT.dps = digits
    spreads = [0]
    values = _value(a, point, spreads), _value(b, point, spreads)
    if error is None and (further := int(max(spreads) * 0.302)) > digits - 30:
        if further > _MOST_DIGITS:
            return written(a) == written(b)
        _CONTEXT.dps = digits = digits + further
        values = _value(a, point, spreads), _value(b, point, spreads)
    return _close(*values, _CONTEXT.mpf(10) ** (25 - digits) if error is None else _CONTEXT.mpf(error))


def _spread(terms: Sequence[Any]) -> int:
    """The number of binary places between the largest and the smallest term of a sum."""
    sizes = [_CONTEXT.mag(term) for term in terms if term and _CONTEXT.isfinite(term)]
    return int(max(sizes) - min(sizes)) if sizes else 0


def _longest(node: Node) -> int:
    """The number of digits of the longest literal."""
    if isinstance(node, Num):
        return max(node.value.numerator.bit_length(), node.value.denominator.bit_length()) // 3
    return max(map(_longest, inside(node)), default=0)


def _close(a: Any, b: Any, allowed: Any) -> bool:
    if a == b:
        return True
    return bool(_CONTEXT.isfinite(a) and _CONTEXT.isfinite(b) and abs(a - b) <= allowed * max(abs(a), abs(b)))


def _point(name: str, point: int) -> Any:
    """The value of a variable at a point: between -3 and 3, determined by its name, and positive at half of the points."""
    fraction = int.from_bytes(hashlib.sha256(f"{name}/{point}".encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
    value = _CONTEXT.mpf(fraction) * 2.5 + 0.5
    return value if point % 2 == 0 else value - 3.5


def _value(node: Node, point: int, spreads: list[int]) -> Any:
    """The value of a node; the spread of each sum is appended to `spreads`. Raises `NotationError` if it is undefined or too costly."""
    c = _CONTEXT
    if isinstance(node, Num):
        return c.mpf(node.value.numerator) / node.value.denominator
    if isinstance(node, Sym):
        known = {"\\pi": c.pi, "e": c.e, "i": c.j, "\\infty": c.inf}
        return +known[node.name] if node.name in known else _point(node.name, point)
    if isinstance(node, Quantity):
        scale = {"%": c.mpf(1) / 100, "°": c.pi / 180}.get(node.unit, c.mpf(1))
        return _value(node.amount, point, spreads) * scale
    if not isinstance(node, Op):
        raise NotationError("no expression")
    arguments = [_value(child, point, spreads) for child in node.args]
    if node.name == "add":
        spreads.append(_spread(arguments))
    power = number_of(node.args[1]) if node.name == "pow" else None
    try:
        if power is not None and 1 < power.value.denominator < 1000 and power.value.denominator % 2:  # as \sqrt[3]{x}^2
            arguments = [_root(arguments[0], _CONTEXT.mpf(power.value.denominator)), _CONTEXT.mpf(power.value.numerator)]
        result = _EVALUATE[node.name](*arguments) if node.name in _EVALUATE else _point(written(node), point)
    except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
        raise NotationError(str(error)) from None
    if result is None or (c.isfinite(result) and abs(c.mag(result)) > 4 * _LARGEST if result else False):
        raise NotationError("too large")
    return result


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > _LARGEST:
        return None
    return base**exponent


def _bounded(function: Callable[..., Any], largest: float) -> Callable[..., Any]:
    def evaluate(*arguments: Any) -> Any:
        return None if any(abs(a) > largest for a in arguments) else function(*arguments)

    return evaluate


def _product(*factors: Any) -> Any:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _root(radicand: Any, index: Any) -> Any:
    if abs(index) > 1000 or not index:
        return None
    real = _CONTEXT.im(radicand) == 0 and radicand < 0 and index == int(index) and int(index) % 2 == 1
    return -((-radicand) ** (1 / index)) if real else radicand ** (1 / index)


def _log(argument: Any, base: Any) -> Any:
    return _CONTEXT.ln(argument) / _CONTEXT.ln(base)


def _whole(function: Callable[[int, int], int]) -> Callable[..., Any]:
    def evaluate(*arguments: Any) -> Any:
        if any(a != int(a.real) or abs(a) > 1e15 for a in arguments):
            return None
        result = int(arguments[0].real)
        for other in arguments[1:]:
            result = function(result, int(other.real))
        return _CONTEXT.mpf(result)

    return evaluate


_EVALUATE: dict[str, Callable[..., Any]] = {
    "add": lambda *terms: sum(terms[1:], terms[0]),
    "neg": lambda a: -a,
    "mul": _product,
    "div": lambda a, b: a / b,
    "pow": _power,
    "root": _root,
    "abs": abs,
    "factorial": _bounded(lambda n: _CONTEXT.gamma(n + 1), 1e5),
    "binom": _bounded(lambda n, k: _CONTEXT.binomial(n, k), 1e5),
    "floor": _bounded(lambda a: _CONTEXT.floor(a), 1e30),
    "ceil": _bounded(lambda a: _CONTEXT.ceil(a), 1e30),
    "ln": lambda a: _CONTEXT.ln(a),
    "log": _log,
    "gcd": _whole(gcd),
    "lcm": _whole(lambda a, b: a * b // gcd(a, b) if a and b else 0),
    "max": lambda *a: max(a, key=lambda v: v.real),
    "min": lambda *a: min(a, key=lambda v: v.real),
    **{
        name: _bounded(lambda *a, own=own: getattr(_CONTEXT, own)(*a), 1e30)
        for name, own in {
            **{n: n for n in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "re", "im", "arg")},
            **{f"arc{n}": f"a{n}" for n in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
        }.items()
    },
}
