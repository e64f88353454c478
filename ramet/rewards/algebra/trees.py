"""Answers as trees: what was written, with nothing evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

CONSTANTS = ("\\pi", "e", "i", "\\infty")


@dataclass(frozen=True, slots=True)
class Num:
    """A literal number. `digits`: significant digits of a decimal, else 0. `kind`: integer, decimal, mixed or scientific."""

    value: Fraction
    kind: str = "integer"
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Sym:
    """A variable, a constant, or anything else that stands for itself."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: `add`, `neg`, `mul`, `div`, `pow`, or the name of a function."""

    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Compound:
    """Several items. `kind` is the two brackets around them, `list` (no brackets), `union`, `ratio`, or a matrix, whose items are rows."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of relations such as `1 < x <= 2`, which has one more part than operators."""

    operators: tuple[str, ...]
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """An amount with a unit, per cent (`%`) or degrees (`°`)."""

    amount: Node
    unit: str


@dataclass(frozen=True, slots=True)
class Text:
    """Words in lower case, or other text that equals only itself."""

    words: str


Node = Num | Sym | Op | Compound | Relation | Quantity | Text


def number_of(node: Node) -> Num | None:
    """The literal number that a node is: an integer, decimal, mixed number, fraction of integers that is no integer, or `1.5 * 10^6`."""
    if isinstance(node, Num):
        return node
    if not isinstance(node, Op):
        return None
    if node.name == "neg":
        inner = number_of(node.args[0])
        return None if inner is None or inner.value < 0 else Num(-inner.value, inner.kind, inner.digits)
    if node.name == "div":
        above, below = (integer_of(argument) for argument in node.args)
        if above is None or not below or (above / below).denominator == 1:
            return None
        return Num(above / below, "fraction")
    if is_scientific(node):
        mantissa, power = node.args
        assert isinstance(mantissa, Num) and isinstance(power, Op)
        exponent = integer_of(power.args[1])
        assert exponent is not None
        return Num(mantissa.value * Fraction(10) ** int(exponent), "scientific", mantissa.digits)
    return None


def integer_of(node: Node) -> Fraction | None:
    """The value of a literal integer, with any signs before it; None for anything else."""
    if isinstance(node, Op) and node.name == "neg":
        inner = integer_of(node.args[0])
        return None if inner is None else -inner
    return node.value if isinstance(node, Num) and node.kind == "integer" else None


def is_scientific(node: Op) -> bool:
    """Whether a product is a number in scientific notation, such as `1.5 * 10^6`."""
    if node.name != "mul" or len(node.args) != 2:
        return False
    mantissa, power = node.args
    if not isinstance(mantissa, Num) or not 1 <= abs(mantissa.value) < 10 or not isinstance(power, Op) or power.name != "pow":
        return False
    exponent = integer_of(power.args[1])
    return power.args[0] == Num(Fraction(10)) and exponent is not None and abs(exponent) <= 1000


def literal(node: Node) -> bool:
    """Whether a node is a literal number; see `number_of`."""
    return number_of(node) is not None


def inside(node: Node) -> tuple[Node, ...]:
    """The children of a node."""
    if isinstance(node, Op):
        return node.args
    if isinstance(node, Compound):
        return node.items
    if isinstance(node, Relation):
        return node.parts
    return (node.amount,) if isinstance(node, Quantity) else ()


def depth_of(node: Node) -> int:
    """Levels of a tree, 1 for a node without children. Not recursive, so that any depth can be measured."""
    depth, level = 0, [node]
    while level:
        depth, level = depth + 1, [child for parent in level for child in inside(parent)]
    return depth


def symbols_of(node: Node) -> set[str]:
    """The names of the variables in a tree."""
    if isinstance(node, Sym):
        return set() if node.name in CONSTANTS else {node.name}
    return {name for child in inside(node) for name in symbols_of(child)}


def written(node: Node) -> str:
    """A canonical spelling: equal for trees that differ only in brackets, signs, and the order of terms, factors and solutions."""
    if isinstance(node, Num):
        return f"{node.kind} {node.value}" if node.kind in ("mixed", "scientific") else str(node.value)
    if isinstance(node, (Sym, Text)):
        return node.name if isinstance(node, Sym) else node.words
    if isinstance(node, Quantity):
        return written(node.amount)
    if isinstance(node, Relation):
        return " ".join((written(node.parts[0]), *(f"{o} {written(p)}" for o, p in zip(node.operators, node.parts[1:], strict=True))))
    name = node.name if isinstance(node, Op) else node.kind
    parts = inside(node)
    if name == "neg" and isinstance(parts[0], Num):
        return str(-parts[0].value)
    texts = [written(child) for child in parts]
    if name in ("add", "mul", "list", "{}", "union"):
        texts.sort()
    return f"{name}({', '.join(texts)})"
