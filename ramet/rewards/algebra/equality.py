r"""Decides whether two trees state the same answer.

Two things must agree. **Value**: compared numerically by `values`, and exactly where both are literal numbers. **Form**: the answer must be
worked out as far as the reference is. A computation is no answer to what it computes (`2+3`, `\log_2 32`, `\binom84`, `6/2`, `\sqrt9` for
a number), a product none where the reference is a sum (`x^2-9` and `(x-3)(x+3)`, either way), several terms none where the reference has
fewer (`2x+3x` for `5x`): see `forms`. Solutions may come in any order; a unit may be missing, and 50% is a half and also an answer to "how
many per cent?".
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from ramet.rewards.algebra.forms import as_finished
from ramet.rewards.algebra.trees import (
    CONSTANTS,
    Compound,
    Node,
    Num,
    Op,
    Quantity,
    Relation,
    Sym,
    Text,
    inside,
    integer_of,
    number_of,
    symbols_of,
    written,
)
from ramet.rewards.algebra.values import equal_values

FLOAT_DIGITS = 15
"""A decimal of so many significant digits is a binary float as a program prints it: equal to what it is nearest to."""
_FLOAT_ERROR = Fraction(1, 10**14)


def same(gold: Node, answer: Node) -> bool:
    """Whether `answer` is equivalent to the reference answer `gold`. Raises `NotationError` for values that are too large to compute."""
    gold, answer = _single(gold), _single(answer)
    if gold == answer:
        return True
    if isinstance(gold, Text) or isinstance(answer, Text):
        return _same_times(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _same_relations(gold, answer)
    amount, answer_amount = _amount(gold)[0], _amount(answer)[0]
    if isinstance(amount, Compound) or isinstance(answer_amount, Compound):
        return _units_agree(_amount(gold)[1], _amount(answer)[1]) and _same_groups(amount, answer_amount)
    return _same_quantities(gold, answer)


def _single(node: Node) -> Node:
    """The node without the brackets of a list or set that has only one item."""
    while isinstance(node, Compound) and node.kind in ("list", "{}", "union") and len(node.items) == 1:
        node = node.items[0]
    if isinstance(node, Compound) and node.kind in ("list", "{}"):
        return Compound(node.kind, _values(node.items))
    return node


def _values(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """The values of solutions that all name the same unknown (`x = 1 or x = 2`; `x = 1, 2`); other items unchanged."""
    values = [_stated(item) if isinstance(item, Relation) else (None, item) for item in items]
    named = [value for value in values if value is not None]
    names = {written(name) for name, _ in named if name is not None}
    if len(named) != len(items) or len(names) != 1 or named[0][0] is None:
        return items
    return tuple(value for _, value in named)


def _same_times(gold: Node, answer: Node) -> bool:
    """Whether two times of day are equal, one with a.m. or p.m. and one without. A bare answer must be past noon on the 24-hour clock."""
    if isinstance(gold, Text) and (later := _hours(answer)):
        return gold.words == f"clock {later[0]}:{later[1]:02}" and later[0] > 12
    if isinstance(answer, Text) and (half := _hours(gold)):
        return answer.words in (f"clock {half[0] % 12}:{half[1]:02}", f"clock {half[0] % 12 + 12}:{half[1]:02}")
    return False


def _hours(node: Node) -> tuple[int, int] | None:
    """(hours, minutes) of a node that can be read as a time of day, such as `6:30`; None of any other."""
    if isinstance(node, Compound) and node.kind == "ratio" and len(node.items) == 2:
        hours, minutes = (integer_of(item) for item in node.items)
        if hours is not None and minutes is not None and 0 <= hours < 24 and 0 <= minutes < 60:
            return int(hours), int(minutes)
    return None


# Relations


def _is_name(node: Node) -> bool:
    """Whether a node may stand before `=` without being part of the answer: `x`, `f(x)`, `f^{-1}(x)`, `(p, q)`, `|AB|`, `AB:CD`, words."""
    if isinstance(node, Compound):
        return node.kind in ("()", "ratio") and all(map(_is_name, node.items))
    if isinstance(node, Op) and node.name == "mul":
        return isinstance(_base(node.args[0]), Sym) and all(_is_name(a) or _is_integer(a) for a in node.args[1:])
    if isinstance(node, Op) and node.name in ("abs", "div"):
        return all(isinstance(a, Sym) and len(a.name) > 1 and a.name.isupper() for a in node.args)
    return isinstance(_base(node), Sym) and not (isinstance(node, Sym) and node.name in CONSTANTS)


def _base(node: Node) -> Node:
    inverse = isinstance(node, Op) and node.name == "pow" and node.args[1] == Num(Fraction(-1))
    return node.args[0] if isinstance(node, Op) and inverse else node


def _is_integer(node: Node) -> bool:
    return isinstance(node, Num) and node.kind == "integer"


def _stated(relation: Relation, of_answer: bool = True) -> tuple[Node | None, Node] | None:
    """The name and the value of `x = 5`, of `x \\in S`, and of a true computation `x = 2 + 3 = 5`; None of another relation."""
    if any(operator not in ("=", "~") for operator in relation.operators) and relation.operators not in (("in",), ("==",)):
        return None
    name = relation.parts[0] if _is_name(relation.parts[0]) else None
    values = relation.parts if name is None else relation.parts[1:]
    if of_answer and name is None and len(values) > 1 and not _numbers(values[0]) and not any(map(symbols_of, values[1:])):
        name, values = values[0], values[1:]  # `a + b = 5`
    if len(values) == 1:
        return None if isinstance(name, Sym) and name.name in symbols_of(values[0]) else (name, values[0])
    if any(isinstance(_amount(v)[0], (Compound, Relation, Text)) or symbols_of(v) for v in values):
        return None
    pairs = zip(relation.operators[-len(values) + 1 :], values, values[1:], strict=False)
    if not all(equal_values(a, b, error=None if operator == "=" else 0.01) for operator, a, b in pairs):
        return None
    exact = [v for v, operator in zip(values, relation.operators[-len(values) + 1 :], strict=False) if operator == "~"]
    return name, exact[0] if exact else values[-1]


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def _same_relations(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        turned = Relation(tuple(_FLIPPED.get(o, o) for o in reversed(answer.operators)), tuple(reversed(answer.parts)))
        if any(gold.operators == r.operators and all(map(same, gold.parts, r.parts)) for r in (answer, turned)):
            return True
        ours, theirs = _stated(gold, of_answer=False), _stated(answer)
        if ours and theirs:
            same_name = ours[0] is None or theirs[0] is None or written(ours[0]) == written(theirs[0])
            return same_name and same(ours[1], theirs[1])
        if ours and (interval := _interval(answer)):
            return same(ours[1], interval)
        if theirs and (interval := _interval(gold)):
            return same(interval, theirs[1])
        return _same_equations(gold, answer)
    relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
    assert isinstance(relation, Relation)
    stated = _stated(relation, relation is answer)
    if stated:
        rounded = relation.operators[-1] == "~" and same(relation.parts[-1], other)
        return rounded or (same(stated[1], answer) if relation is gold else same(gold, stated[1]))
    interval = _interval(relation)
    return interval is not None and isinstance(other, Compound) and other.kind not in ("list", "ratio") and same(interval, other)


def _same_equations(gold: Relation, answer: Relation) -> bool:
    """Whether two equations with right sides of zero are equal up to the sign of the left side."""
    zero = Num(Fraction(0))
    if gold.operators == answer.operators == ("=",) and gold.parts[1] == answer.parts[1] == zero:
        return same(gold.parts[0], Op("neg", (answer.parts[0],)))
    return False


def _interval(relation: Relation) -> Node | None:
    """The interval that `a < x <= b`, or one half of it, states for its one unknown."""
    infinity = Sym("\\infty")
    operators, parts = relation.operators, relation.parts
    if any(o not in _FLIPPED for o in operators) or len(parts) > 3:
        return None
    if operators[0] in (">", ">="):
        operators, parts = tuple(_FLIPPED[o] for o in reversed(operators)), tuple(reversed(parts))
    if any(o not in ("<", "<=") for o in operators):
        return None
    unknown = [_is_name(p) for p in parts]
    opening, closing = "(" if operators[0] == "<" else "[", ")" if operators[-1] == "<" else "]"
    if unknown == [False, True, False]:
        return Compound(opening + closing, (parts[0], parts[2]))
    if unknown == [True, False]:
        return Compound("(" + closing, (Op("neg", (infinity,)), parts[1]))
    if unknown == [False, True]:
        return Compound(opening + ")", (parts[0], infinity))
    return None


def _numbers(node: Node) -> bool:
    return isinstance(node, Num) or any(map(_numbers, inside(node)))


# Groups


def _same_groups(gold: Node, answer: Node) -> bool:
    gold, answer = _as_union(gold), _as_union(answer)
    if isinstance(gold, Compound) and isinstance(answer, Compound) and {gold.kind, answer.kind} == {"()", "list"}:
        gold, answer = _as_point(gold), _as_point(answer)
    if not isinstance(gold, Compound) or not isinstance(answer, Compound):
        group, other = (gold, answer) if isinstance(gold, Compound) else (answer, gold)
        assert isinstance(group, Compound)
        if group.kind == "ratio" and len(group.items) == 2:
            quotient = Op("div", group.items)
            number = number_of(other)
            return number is not None and number.value.denominator > 1 and equal_values(quotient, other)
        return {written(group), written(other)} == {written(_ALL), written(_REALS)}
    times = _hours(gold), _hours(answer)
    if all(t and t[1] > 9 for t in times):
        return times[0] == times[1]
    if gold.kind == answer.kind == "ratio":
        return len(gold.items) == len(answer.items) and all(
            equal_values(Op("mul", (a, d)), Op("mul", (b, c)))
            for a, b, c, d in zip(gold.items, gold.items[1:], answer.items, answer.items[1:], strict=False)
        )
    if {gold.kind, answer.kind} <= {"list", "{}", "union"} and (gold.kind == "union") == (answer.kind == "union"):
        lists = gold.kind == answer.kind == "list"
        return _same_sets(gold.items if lists else _distinct(gold.items), answer.items)
    return gold.kind == answer.kind and len(gold.items) == len(answer.items) and all(map(same, gold.items, answer.items))


_REALS = Sym("\\mathbbR")
_ALL = Compound("()", (Op("neg", (Sym("\\infty"),)), Sym("\\infty")))


def _as_union(node: Node) -> Node:
    """The union of intervals that inequalities of one unknown joined by `or` stand for."""
    if isinstance(node, Compound) and node.kind in ("list", "union") and any(isinstance(i, Relation) for i in node.items):
        intervals = [_interval(i) if isinstance(i, Relation) else i for i in node.items]
        if all(i is not None for i in intervals):
            return Compound("union", tuple(i for i in intervals if i is not None))
    return node


def _as_point(node: Compound) -> Compound:
    """The point (1, 2) for `y = 2, x = 1`: values in the order of their names."""
    values = [_stated(item) if isinstance(item, Relation) else None for item in node.items]
    named = {f[0].name: f[1] for f in values if f is not None and isinstance(f[0], Sym)}
    if node.kind != "list" or len(named) != len(node.items):
        return node
    return Compound("()", tuple(named[name] for name in sorted(named)))


def _same_sets(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    """Whether the items agree in any order. What `gold` has twice must occur twice; repetitions in `answer` do not count."""
    unmatched = list(answer)
    for item in gold:
        place = next((i for i, other in enumerate(unmatched) if same(item, other)), None)
        if place is None:
            return False
        unmatched.pop(place)
    return all(any(same(item, other) for item in gold) for other in unmatched) and (not unmatched or len(gold) == len(_distinct(gold)))


def _distinct(items: Sequence[Node]) -> list[Node]:
    distinct: list[Node] = []
    for item in items:
        if not any(same(item, other) for other in distinct):
            distinct.append(item)
    return distinct


# Quantities and expressions


def _amount(node: Node) -> tuple[Node, str]:
    """(amount, unit) of a quantity, which may be negated; the unit is "" for anything else."""
    units: list[str] = []
    negative = False
    while isinstance(node, Quantity) or (isinstance(node, Op) and node.name == "neg" and isinstance(node.args[0], Quantity)):
        if isinstance(node, Quantity):
            units.append(node.unit)
            node = node.amount
        else:
            negative = not negative
            node = node.args[0]
    return (Op("neg", (node,)) if negative else node), " ".join(dict.fromkeys(u for u in reversed(units) if u))


def _units_agree(gold: str, answer: str) -> bool:
    """Whether one unit is missing, or all words of one occur in the other."""
    ours, theirs = set(gold.split()), set(answer.split())
    return ours <= theirs or theirs <= ours


def _same_quantities(gold: Node, answer: Node) -> bool:
    (ours, unit), (theirs, other) = _amount(gold), _amount(answer)
    ours_percent, theirs_percent = "%" in unit.split(), "%" in other.split()
    if ours_percent == theirs_percent:
        return _units_agree(unit, other) and _same_expressions(ours, theirs)
    if ours_percent:  # of 50%: 50%, 0.5, and 50 as an answer to "how many per cent"
        return _same_expressions(ours, theirs) or (not other and _same_expressions(ours, theirs, Fraction(1, 100)))
    small = (isinstance(ours, Num) and abs(ours.value) < 1) or isinstance(ours, Op)
    return _same_expressions(ours, theirs, Fraction(100)) or (not small and _same_expressions(ours, theirs))


def _same_expressions(gold: Node, answer: Node, scale: Fraction = Fraction(1)) -> bool:
    """Whether `answer` has the form of `gold`, and `scale` times its value."""
    ours, theirs = number_of(gold), number_of(answer)
    if ours is not None and theirs is not None:
        return _same_numbers(ours.value * scale, theirs.value, max(ours.digits, theirs.digits))
    if not as_finished(gold, answer):
        return False
    return equal_values(Op("mul", (Num(scale), gold)) if scale != 1 else gold, answer)


def _same_numbers(ours: Fraction, theirs: Fraction, digits: int) -> bool:
    return ours == theirs or (digits >= FLOAT_DIGITS and abs(ours - theirs) <= _FLOAT_ERROR * abs(ours))
