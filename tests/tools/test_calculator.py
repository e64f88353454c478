"""The calculator: right where it answers, and quick whatever it is asked."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.agents.tree import ToolStatus
from ramet.errors import CallError
from ramet.tools.calculator import MAX_CHARACTERS, calculate, calculator
from tests.tools.calling import call

leaves = st.integers(0, 10**6).map(str) | st.decimals(0, 1000, places=3).map(str)
expressions = st.recursive(
    leaves,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})") | inner.map("-{}".format),
    max_leaves=12,
)


def exactly(expression: str) -> Fraction:
    """Python's own evaluation, every number of it a fraction."""
    tokens = expression.replace("(", " ( ").replace(")", " ) ").replace("-", " - ").split()
    return eval("".join(f"Fraction('{token}')" if token[0].isdigit() else token for token in tokens), {"Fraction": Fraction})


@given(expressions)
def test_arithmetic_is_exact_until_it_is_written(expression):
    try:
        value = exactly(expression)
    except ZeroDivisionError:
        with pytest.raises(CallError, match="division by zero"):
            calculate(expression)
        return
    written = calculate(expression)
    if value.denominator == 1:
        assert written == str(value.numerator)
    else:
        assert abs(Fraction(written) - value) <= abs(value) * Fraction(1, 10**15)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("0.1 + 0.2", "0.3"),
        ("2 ^ 10 - 1", "1023"),
        ("3 \N{MULTIPLICATION SIGN} 4 \N{DIVISION SIGN} 8 \N{MINUS SIGN} 1", "0.5"),
        ("1/3", "0.3333333333333333"),
        ("12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900"),
        ("sqrt(144) + sqrt(1/4)", "12.5"),
        ("2 ** 0.5", str(math.sqrt(2))),
        ("2 ** -2", "0.25"),
        ("round(pi, 2)", "3.14"),
        ("factorial(20) / factorial(18)", "380"),
        ("comb(52, 5)", "2598960"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("floor(-2.5) + ceil(2.5)", "0"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("lcm(4, 6) + gcd(12, 18)", "18"),
        ("log(8, 2)", "3"),
        (" + ".join("123"), "6"),
        ("+".join(["1"] * 400), "400"),
        ("1 / 8 ** 4", "0.000244140625"),
        ("1.0000001 ** 1000000", str(1.0000001**1000000)),
        ("7 ** 2000 % 13", "3"),
        ("1e-300 * 1e-300", "1E-600"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("9**9**9", "too large"),
        ("9**9**9**9", "too large"),
        ("1" + "0" * 900 + "**99999", "too large"),
        ("*".join(["factorial(1000)"] * 60), "too large"),
        ("factorial(10**9)", "at most 1000"),
        ("comb(10**9, 10**8)", "at most 10000"),
        ("round(1/3, 10**9)", "at most 100"),
        ("exp(10**6)", "too large"),
        ("1e999", "too large"),
        ("(" * 400 + "1" + ")" * 400, "too many nested parentheses"),
        ("-" * 999 + "1", "nested too deeply"),
        ("1+" * 2000, f"at most {MAX_CHARACTERS} characters"),
        ("(-8) ** 0.5", "not a real number"),
        ("sqrt(-1)", "no value"),
        ("0 ** -1", "division by zero"),
        ("5 % 0", "division by zero"),
        ("factorial(-1)", "no value"),
        ("factorial(2.5)", "whole numbers only"),
        ("log()", "log does not take 0 numbers"),
        ("sqrt(1, 2)", "sqrt does not take 2 numbers"),
        ("__import__('os').system('ls')", "only arithmetic"),
        ("().__class__", "only arithmetic"),
        ("open('/etc/passwd')", "there is no 'open'"),
        ("eval('1')", "there is no 'eval'"),
        ("(lambda: 1)()", "only arithmetic"),
        ("[x for x in (1,)]", "only arithmetic"),
        ("x := 1", "no expression"),
        ("1; 2", "no expression"),
        ("'a' * 10**9", "only arithmetic"),
        ("True + 1", "only arithmetic"),
        ("1j", "only arithmetic"),
        ("1 if 1 else 2", "only arithmetic"),
        ("f'{1}'", "only arithmetic"),
        ("1 << 10**9", "only arithmetic"),
        ("x", "there is no 'x'"),
        ("", "no expression"),
        ("<|im_end|>", "no expression"),
        ("1\0+", "no expression"),
        ("\ud800", "no expression"),
    ],
)
def test_what_is_not_worked_out_is_told_in_one_line(expression, said):
    with pytest.raises(CallError, match=said) as error:
        calculate(expression)
    assert "\n" not in str(error.value)


@given(st.text("0123456789.+-*/%()^ ,eabcdfgilmnopqrstx", max_size=40) | st.text(max_size=40))
def test_any_text_has_a_value_or_is_refused(expression):
    try:
        assert calculate(expression)
    except CallError as error:
        assert str(error)


@pytest.mark.anyio
async def test_the_tool_answers_and_refuses_by_its_status():
    assert await call(calculator, expression="6 * 7") == (ToolStatus.DONE, "42")
    assert await call(calculator, expression="1 / 0") == (ToolStatus.INVALID, "division by zero")
