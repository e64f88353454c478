"""A calculator: exact on whole numbers and fractions, and quick on whatever it is asked.

Expressions are parsed as Python and evaluated node by node, so that nothing but arithmetic is ever run. A number that would need more
than `MAX_BITS` bits is rounded to a float, or refused where it is too large for one, before it is computed.
"""

from __future__ import annotations

import ast
import decimal
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ramet.agents.tools import tool
from ramet.agents.tree import ToolResult, ToolStatus
from ramet.errors import CallError

MAX_CHARACTERS, MAX_BITS = 1000, 10_000
"""Of an expression, and of a number's numerator or denominator: some 3,000 digits."""
MAX_DEPTH = 400
"""Of an expression. A sum of many numbers is as deep as they are many."""
MAX_FACTORIAL = 1000
MAX_PLACES = 100

Number = Fraction | float


@tool(timeout=10.0)
async def calculator(expression: str) -> ToolResult:
    """Work out an arithmetic expression, such as "2 * (3 + 4) ** 2 / 7". There are + - * / // % **, sqrt, exp, log(x, base), log2,
    log10, sin, cos, tan, asin, acos, atan, abs, round(x, places), floor, ceil, min, max, factorial, comb, gcd, lcm, pi and e.
    """
    try:
        return ToolResult(ToolStatus.DONE, calculate(expression))
    except CallError as error:
        return ToolResult(ToolStatus.INVALID, str(error))


def calculate(expression: str) -> str:
    """The value of an expression, in full if it has at most 30 digits or is whole, else rounded to 16. Raises `CallError`."""
    if len(expression) > MAX_CHARACTERS:
        raise CallError(f"an expression has at most {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.translate(_SPELLED).strip(), mode="eval")
    except SyntaxError as error:
        raise CallError(f"this is no expression: {error.msg}") from None
    except UnicodeEncodeError:
        raise CallError("this is no expression: it is no text") from None
    except (RecursionError, MemoryError):
        raise CallError("the expression is nested too deeply") from None
    try:
        return _written(_value(tree.body))
    except ZeroDivisionError:
        raise CallError("division by zero") from None
    except OverflowError:
        raise CallError("a number is too large") from None
    except ValueError as error:  # such as the square root of -1
        raise CallError(f"this has no value: {error}") from None


_SPELLED = str.maketrans({"^": "**", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-", "\0": " "})


def _value(node: ast.expr, depth: int = 1) -> Number:
    if depth > MAX_DEPTH:
        raise CallError("the expression is nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            # As it is written: 0.1 is a tenth.
            return _checked(Fraction(repr(number)) if math.isfinite(number) else number)
        case ast.Name(id="pi" | "e" as name):
            return math.pi if name == "pi" else math.e
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _checked(_OPERATORS[type(op)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            values = [_value(argument, depth + 1) for argument in arguments]
            try:
                return _checked(_FUNCTIONS[name](*values))
            except TypeError:
                raise CallError(f"{name} does not take {len(values)} numbers") from None
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise CallError(f"there is no {name[:40]!r}; there are numbers, operators, pi, e, {', '.join(_FUNCTIONS)}")
    raise CallError("only arithmetic can be worked out: numbers, operators and functions of numbers")


def _checked(number: complex | Fraction) -> Number:
    """A number as one that this module computes with."""
    if isinstance(number, complex):
        raise CallError("the result is not a real number")
    if isinstance(number, float) and not math.isfinite(number):
        raise OverflowError
    exact = Fraction(number) if isinstance(number, int | Fraction) else number
    return float(exact) if isinstance(exact, Fraction) and _bits(exact) > MAX_BITS else exact


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _power(base: Number, exponent: Number) -> complex | Fraction:
    match base, exponent:
        case Fraction(), Fraction(denominator=1) if _bits(base) * abs(exponent) <= MAX_BITS:
            return Fraction(base**exponent.numerator)
    power: complex = float(base) ** float(exponent)
    return power


def _root(number: Number) -> Number:
    if isinstance(number, Fraction) and number >= 0:
        exact = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
        if exact * exact == number:
            return exact
    return math.sqrt(number)


def _round(number: Number, places: Number = Fraction(0)) -> Number:
    digits = _whole(places)
    if abs(digits) > MAX_PLACES:
        raise CallError(f"round takes at most {MAX_PLACES} places")
    return round(Fraction(number), digits)


def _factorial(number: Number) -> Fraction:
    if number > MAX_FACTORIAL:
        raise CallError(f"factorial takes at most {MAX_FACTORIAL}")
    return Fraction(math.factorial(_whole(number)))


def _comb(n: Number, k: Number) -> Fraction:
    if n > MAX_BITS:
        raise CallError(f"comb takes at most {MAX_BITS}")
    return Fraction(math.comb(_whole(n), _whole(k)))


def _whole(number: Number) -> int:
    if number != math.floor(number):
        raise CallError("this takes whole numbers only")
    return int(number)


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], complex | Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., complex | Fraction]] = {
    "sqrt": _root,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "factorial": _factorial,
    "comb": _comb,
    "gcd": lambda *numbers: math.gcd(*map(_whole, numbers)),
    "lcm": lambda *numbers: math.lcm(*map(_whole, numbers)),
}


def _written(number: Number) -> str:
    if isinstance(number, float) and not (number.is_integer() and abs(number) < 2**53):
        value = decimal.Decimal(repr(number))
    else:
        exact = Fraction(number)
        if exact.denominator == 1:
            return str(exact.numerator)
        numerator, denominator = decimal.Decimal(exact.numerator), decimal.Decimal(exact.denominator)
        context = decimal.Context(prec=30, traps=[])
        value = context.divide(numerator, denominator)
        if context.flags[decimal.Inexact]:
            value = decimal.Context(prec=16, traps=[]).divide(numerator, denominator)
    return format(value, "f") if -7 <= value.adjusted() <= 30 else str(value)
