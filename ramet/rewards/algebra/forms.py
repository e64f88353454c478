r"""Features that distinguish the forms of expressions: a computation from its result, a product from a sum, simplified from unsimplified.

Not distinguished are: terms and factors in another order; a sign inside or outside; a division by a number inside or outside; literal
numbers as decimal, fraction, mixed number or in scientific notation; radicals simplified, rationalised, or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from math import gcd, prod

from ramet.errors import NotationError
from ramet.rewards.algebra.trees import (
    CONSTANTS,
    Node,
    Num,
    Op,
    Quantity,
    Sym,
    integer_of,
    is_scientific,
    literal,
    number_of,
    symbols_of,
)

_AT_MOST = frozenset(("add", "sym", "div", "\\pi", "e", "i", "\\infty"))
"""Of these an answer may have fewer than the reference; of all else as many."""
_EVALUATED = frozenset(("mul", "pow", "factor", "power of product", "power of power", "power of sum", "quotient"))


def as_finished(gold: Node, answer: Node) -> bool:
    """Whether `answer` has the form of the reference answer `gold`; see the module."""
    ours, theirs = profile(gold), profile(answer)
    if literal(answer) and not any(ours[key] for key in _EVALUATED) and not ours["sym"]:
        return not ours["add"]  # the number that `\\binom84` is
    above, below = theirs.pop("surd", 0), theirs.pop("surd below", 0)
    radicals = ours.pop("surd", 0) + ours.pop("surd below", 0)
    if above > radicals or (below and not radicals):
        return False
    if any(ours[key] < theirs[key] if key in _AT_MOST else ours[key] != theirs[key] for key in ours | theirs):
        return False
    return (not ours["sym"] and not theirs["sym"]) or _top(gold) == _top(answer)


def profile(node: Node) -> Counter[str]:
    """The features of a form, counted: terms, variables, functions, factors that are sums, arithmetic that is not carried out."""
    counts: Counter[str] = Counter()
    _count(node, counts, below=False)
    return counts


def _count(node: Node, counts: Counter[str], below: bool, times: int = 1) -> None:
    if isinstance(node, Sym):
        counts[node.name if node.name in CONSTANTS else "sym"] += times
        if below and node.name == "i":
            counts["complex below"] += times
        return
    if isinstance(node, Quantity):
        _count(node.amount, counts, below, times)
        return
    if not isinstance(node, Op):
        if not isinstance(node, Num):
            raise NotationError("no expression")
        return
    if literal(node):
        return
    if node.name == "root":
        _count_root(node, counts, below, times)
        return
    if node.name == "pow":
        _count_power(node, counts, below, times)
        return
    if node.name == "add":
        counts["add"] += times * (len(node.args) - 1)
    elif node.name == "mul":
        _count_factors(node, counts, times)
    elif node.name == "div":
        above, denominator = node.args
        if isinstance(above, Num) and isinstance(denominator, Num):
            counts["div"] += times
        counts["div"] += times * sum(
            (isinstance(a, Op) and a.name == "div") or (isinstance(a, Num) and a.kind == "fraction") for a in node.args
        )
        counts["quotient"] += times * bool(symbols_of(denominator))
        if symbols_of(node) and gcd(_content(above), _content(denominator)) > 1:
            counts["div"] += times
        _count(above, counts, below, times)
        _count(denominator, counts, not below, times)
        return
    elif node.name == "neg":
        counts["double sign"] += times * ((inner := number_of(node.args[0])) is not None and inner.value < 0)
    else:
        counts[f"call {node.name}"] += times
    for argument in node.args:
        _count(argument, counts, below, times)


def _content(node: Node) -> int:
    """The whole number that divides the written coefficients of all terms."""
    value = integer_of(node)
    if value is not None:
        return abs(int(value))
    if not isinstance(node, Op) or node.name not in ("neg", "mul", "add"):
        return 1
    contents = [_content(argument) for argument in node.args]
    return gcd(*contents) if node.name == "add" else prod(contents)


def _count_root(node: Op, counts: Counter[str], below: bool, times: int) -> None:
    radicand, index = node.args
    value = number_of(radicand)
    if value is None:
        inner = profile(radicand)
        counts["nested root"] += times * bool(inner["surd"] + inner["surd below"] + inner["root"])
        counts["root"] += times
        _count(radicand, counts, below, times)
    elif _perfect(value.value, integer_of(index)):
        counts["perfect root"] += times
    else:
        counts["surd below" if below else "surd"] += times


def _perfect(value: Fraction, index: Fraction | None) -> bool:
    """Whether the root is a rational number."""
    if index is None or index < 1 or value < 0 or index > 100:
        return False

    def whole(n: int) -> bool:
        root = round(n ** (1 / int(index))) if n < 10**300 else 0
        return any(r ** int(index) == n for r in (root - 1, root, root + 1) if r >= 0)

    return whole(value.numerator) and whole(value.denominator)


def _count_power(node: Op, counts: Counter[str], below: bool, times: int) -> None:
    base, exponent = node.args
    power = number_of(exponent)
    value = number_of(base)
    if value is not None and power is not None:
        if power.value.denominator == 1:
            counts["pow"] += times
        elif _perfect(
            value.value ** abs(power.value.numerator) if abs(power.value.numerator) < 20 else Fraction(2), Fraction(power.value.denominator)
        ):
            counts["perfect root"] += times
        else:
            counts["surd below" if below != (power.value < 0) else "surd"] += times
        return
    if power is not None and power.value in (0, 1):
        counts["idle power"] += times
    inner = base.args[0] if isinstance(base, Op) and base.name == "neg" else base
    if isinstance(inner, Op) and power is not None and power.value.denominator == 1:
        if inner.name == "add" and symbols_of(inner) and 1 < power.value <= 20:
            counts["factor"] += times * int(power.value)
            _count(base, counts, below, times * int(power.value))
            return
        kinds = {"add": "power of sum", "mul": "power of product", "div": "power of product", "pow": "power of power"}
        if inner.name in kinds:
            counts[kinds[inner.name]] += times
    if power is not None and power.value < 0 and symbols_of(base):
        counts["quotient"] += times
    if power is not None and power.value.denominator != 1:
        counts["root"] += times
    _count(base, counts, below != (power is not None and power.value < 0), times)
    _count(exponent, counts, False, times)


def _flat(node: Op) -> Iterator[Node]:
    for argument in node.args:
        inner = argument.args[0] if isinstance(argument, Op) and argument.name == "neg" else argument
        if isinstance(inner, Op) and inner.name == "mul" and not is_scientific(inner):
            yield from _flat(inner)
        else:
            yield inner


def _count_factors(node: Op, counts: Counter[str], times: int) -> None:
    """Count the numbers to be multiplied and the sums among the factors; powers of sums are counted as powers."""
    factors = list(_flat(node))
    numbers = [n for n in map(number_of, factors) if n is not None]
    powers = [f for f in factors if isinstance(f, Op) and f.name == "pow" and all(map(literal, f.args)) and number_of(f) is None]
    counts["mul"] += times * (max(len(numbers) + len(powers) - 1, 0) + any(n.value == 1 for n in numbers))
    surds = [f for f in factors if isinstance(f, Op) and f.name == "root" and literal(f.args[0])]
    counts["mul"] += times * max(len(surds) - 1, 0)
    sums = [f for f in factors if isinstance(f, Op) and f.name == "add" and symbols_of(f)]
    others = len(factors) - len(sums) - len(numbers) + sum(abs(n.value.numerator) != 1 for n in numbers)
    if sums and (len(sums) > 1 or others):
        counts["factor"] += times * len(sums)


def _top(node: Node) -> str:
    """The outermost operation of an expression in variables, coefficients aside: a sum, a quotient or a product."""
    while isinstance(node, Op):
        if node.name == "neg":
            node = node.args[0]
        elif node.name == "div":
            if symbols_of(node.args[1]):
                return "quotient"
            node = node.args[0]
        elif node.name == "mul":
            variable = [f for f in node.args if symbols_of(f)]
            if any(_top(f) == "quotient" for f in variable):
                return "quotient"
            if len(variable) != 1:
                return "product"
            node = variable[0]
        elif node.name == "pow":
            power = number_of(node.args[1])
            return "quotient" if power is not None and power.value < 0 and symbols_of(node.args[0]) else "product"
        else:
            return "sum" if node.name == "add" else "product"
    return "product"
