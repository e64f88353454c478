r"""The grammar of mathematical notation: tokens to a tree, by recursive descent.

Precedence, from the loosest: lists (`,` `;`), relations (`=` `<` ...), ratios (`:`), set operations, sums, products and quotients with
the unit after them, powers and other postfix operators. `UnknownNotation` is raised for balanced text outside of the grammar.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ramet.errors import NotationError, UnknownNotation
from ramet.rewards.algebra.lexing import FUNCTIONS, Token, plain_words
from ramet.rewards.algebra.trees import Compound, Node, Num, Op, Quantity, Relation, Sym, Text, written
from ramet.rewards.algebra.units import CURRENCIES, MULTIPLES, NUMBER_WORDS, NUMBERS, unit_name

DEEPEST = 60
"""Most levels of nested brackets."""
_BIG = frozenset(("\\sum", "\\prod", "\\int", "\\iint", "\\iiint", "\\oint", "\\lim", "\\sup", "\\inf", "\\bigcup", "\\bigcap"))
_STYLES = frozenset((
    "\\mathbf", "\\mathit", "\\mathcal", "\\mathbb", "\\vec", "\\hat", "\\bar", "\\overline", "\\underline", "\\widehat",
    "\\overrightarrow", "\\boldsymbol", "\\bm", "\\mathsf", "\\mathfrak", "\\tilde", "\\overset", "\\stackrel",
))  # fmt: skip
_FACES = frozenset(("\\mathbf", "\\mathit", "\\boldsymbol", "\\bm", "\\mathsf", "\\underline"))
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in", "\\equiv": "==", "\\to": "->",
    "\\cong": "cong",
}  # fmt: skip
_DEGREE = (Sym("\\circ"), Sym("°"))
_AFTER_FACTOR = frozenset((
    ")", "]", "}", "\\}", ",", ";", "+", "-", "*", "/", ":", "^", "_", "!", "\\cup", "\\cap", "\\setminus", "&", "\\\\", "%", "\\%",
    "°", "'", "\\pmod",
))  # fmt: skip


class Parser:
    """A recursive descent parser over the tokens of one text.

    at     index of the next token
    depth  nesting depth so far, which is limited
    bars   absolute values that are open, since `|` both opens and closes one
    """

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.bars = 0

    @property
    def next(self) -> str:
        """The text of the next token; "" at the end."""
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        """The kind of the next token; "" at the end."""
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        """Consume the next token and return its text. Raises `UnknownNotation` at the end, or if it is not the one wanted."""
        if self.at >= len(self.tokens) or (wanted and self.next != wanted):
            raise UnknownNotation
        self.at += 1
        return self.tokens[self.at - 1].text

    def whole(self) -> Node:
        """The tree of all tokens. Raises `UnknownNotation` if some are left over."""
        items = self.sequence()
        if self.at < len(self.tokens):
            raise UnknownNotation
        return items[0] if len(items) == 1 else Compound("list", tuple(items))

    def sequence(self) -> list[Node]:
        """Items separated by commas."""
        items = [self.relation()]
        while self.next in (",", ";"):
            while self.next in (",", ";"):  # a comma before "and" is no empty item
                self.take()
            items.append(self.relation())
        return items

    def relation(self) -> Node:
        """Ratios joined by relation signs."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotationError("nested too deep")
        operators, parts = [], []
        if self.next == "\\approx":
            self.take()
        parts.append(self.ratio())
        while self.next in _RELATIONS:
            operators.append(_RELATIONS[self.take()])
            parts.append(self.ratio())
        self.depth -= 1
        return Relation(tuple(operators), tuple(parts)) if operators else parts[0]

    def ratio(self) -> Node:
        """Unions joined by colons."""
        parts = [self.union()]
        while self.next == ":":
            self.take()
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else Compound("ratio", tuple(parts))

    def union(self) -> Node:
        """Sums joined by set operators, all of one kind."""
        operands, operator = [self.sum()], ""
        while self.next in ("\\cup", "\\cap", "\\setminus") and operator in ("", self.next):
            operator = self.take()
            operands.append(self.sum())
        return operands[0] if not operator else Compound({"\\cup": "union"}.get(operator, operator), tuple(operands))

    def sum(self) -> Node:
        """Terms joined by signs."""
        terms: list[Node] = []
        while True:
            sign = self.sign()
            term = self.term()
            terms.append(_negative(term) if sign == "-" else term)
            if self.next not in ("+", "-"):
                return terms[0] if len(terms) == 1 else Op("add", tuple(terms))

    def sign(self) -> str:
        """The sign that a run of signs amounts to; "" without any."""
        sign = ""
        while self.next in ("+", "-"):
            sign = "-" if (self.take() == "-") != (sign == "-") else "+"
        return sign

    def term(self) -> Node:
        """Products and quotients, left to right; then the unit."""
        first = self.factor()
        product = [first]
        while True:
            if self.next == "*":
                self.take()
                product.append(self.factor(signed=True))
            elif self.next == "/":
                self.take()
                product = [Op("div", (_product(product), self.factor(signed=True)))]
            elif self.starts_factor():
                if isinstance(product[-1], Num) and self.kind in ("number", "thousands", "repeating", "scientific"):
                    raise UnknownNotation
                product.append(self.factor())
            else:
                break
        amount = _product(product)
        while self.kind == "text":
            amount = self.quantity(amount)
        if self.next == "\\pmod":
            self.take()
            amount = Quantity(amount, f"mod {written(self.argument(whole=True))}")
        return amount

    def quantity(self, amount: Node) -> Node:
        """An amount with the unit in words that follows it. Raises `UnknownNotation` for words that are not a unit."""
        words: list[str] = []
        while self.kind == "text" or (self.next in ("/", "^") and words) or (self.next == "." and words):
            mark = self.take()
            if mark == "^":
                words[-1] += f"^{_digits_of(self.argument())}"
            elif mark == "/":
                words += ["per"]
                words.append(self.take()) if self.kind in ("text", "symbol") else None
            elif mark != ".":
                words += mark.replace("/", " per ").replace(".", " ").replace("'", "").split()
        if words and words[0].casefold() in MULTIPLES and isinstance(amount, Num):
            amount = Num(amount.value * 10 ** MULTIPLES[words[0].casefold()], "decimal")
            words = words[1:]
        if any(word.casefold() in NUMBER_WORDS or re.search(r"[^\w^%-]", word) for word in words):
            raise UnknownNotation
        return Quantity(amount, unit_name(words)) if words else amount

    def starts_factor(self) -> bool:
        """Whether the next token can begin a factor, so that a product is written without a sign."""
        if self.at >= len(self.tokens) or self.kind in ("text", "end"):
            return False
        if self.next == "|":
            return not self.bars
        return (
            self.next not in _AFTER_FACTOR and self.next not in _RELATIONS and not self.next.startswith(("\\rfloor", "\\rceil", "\\rangle"))
        )

    def factor(self, signed: bool = False) -> Node:
        """A primary expression with its postfix operators: factorial, per cent, degrees, currency, prime, power."""
        if signed and self.next in ("-", "+"):
            return _negative(self.factor()) if self.sign() == "-" else self.factor()
        base = self.primary()
        while True:
            if self.next == "!":
                self.take()
                base = Op("factorial", (base,))
            elif self.next in ("%", "\\%"):
                self.take()
                base = Quantity(base, "%")
            elif self.next == "°":
                base = Quantity(base, self.take())
            elif self.next in CURRENCIES and (self.at + 1 == len(self.tokens) or self.tokens[self.at + 1].kind != "number"):
                base = Quantity(base, CURRENCIES[self.take()])
            elif self.next == "'" and isinstance(base, Sym):
                self.take()
                base = Sym(base.name + "'")
            elif self.next == "^":
                self.take()
                exponent = self.exponent()
                base = Quantity(base, "°") if exponent in _DEGREE else Op("pow", (base, exponent))
            else:
                return base

    def exponent(self) -> Node:
        """An exponent; powers of powers are read from the right."""
        parts = [self.argument(whole=True)]
        while self.next == "^":
            self.take()
            parts.append(self.argument(whole=True))
        power = parts.pop()
        while parts:
            power = Op("pow", (parts.pop(), power))
        return power

    def argument(self, whole: bool = False) -> Node:
        """A brace group or one token: one digit of a number, all of it if `whole`."""
        if self.next == "{":
            self.take()
            inner = self.relation()
            self.take("}")
            return inner
        if self.kind == "number" and not whole:
            token = self.tokens[self.at]
            if len(token.text) > 1 and token.text[0] != ".":
                self.tokens[self.at] = Token("number", token.text[1:], False)
                return Num(Fraction(token.text[0]))
        if self.next in ("-", "+"):
            return _negative(self.primary()) if self.sign() == "-" else self.primary()
        return self.primary()

    def primary(self) -> Node:
        """A number, symbol, bracket or command. Raises `NotationError` where it is nested too deep."""
        self.depth += 1
        if self.depth > 2 * DEEPEST:
            raise NotationError("nested too deep")
        node = self._primary()
        self.depth -= 1
        return node

    def _primary(self) -> Node:
        kind, token = self.kind, self.take()
        if kind in ("number", "thousands"):
            return self.number(token)
        if kind == "repeating":
            return Num(_repeating(token), "decimal")
        if kind == "scientific":
            return Num(_scientific(token), "scientific")
        if kind == "based":
            digits, _, base = token.partition("_")
            return Text(f"base {_base(base)}: {digits}")
        if kind == "symbol" or token == "…" or kind == "dots":
            return self.subscripted(token)
        if token in ("(", "["):
            return self.bracketed(token)
        if token == "{":
            items = self.sequence()
            inner = self.choose(items[0]) if len(items) == 1 else Compound("{}", tuple(items))
            self.take("}")
            return inner
        if token == "\\{":
            items = [] if self.next == "\\}" else self.sequence()
            self.take("\\}")
            return Compound("{}", tuple(items)) if items else Sym("\\emptyset")
        if token == "|":
            self.bars += 1
            inner = self.sum()
            self.bars -= 1
            self.take("|")
            return Op("abs", (inner,))
        if kind == "begin":
            return self.matrix(token)
        if token in CURRENCIES:
            return Quantity(self.factor(signed=True), CURRENCIES[token])
        if kind == "command":
            return self.command(token)
        if kind == "text":
            while self.kind == "text":
                token += " " + self.take()
            if self.next in ("=", "\\approx"):
                return Sym(plain_words(token))
        if token in CURRENCIES.values():
            return Quantity(self.factor(signed=True), token)
        raise UnknownNotation

    def number(self, token: str) -> Node:
        """A number whose first token is consumed; with a proper fraction after it, a mixed number."""
        token = token.replace(",", "")
        whole = "." not in token
        if whole and self.next == "\\frac":
            mark = self.at
            self.take()
            try:
                above, below = self.argument(), self.argument()
            except UnknownNotation:
                above = below = Sym("")
            if _proper(above, below):
                assert isinstance(above, Num) and isinstance(below, Num)
                return Num(Fraction(token) + above.value / below.value, "mixed")
            self.at = mark
        if whole and self.kind == "number" and self.tokens[self.at].spaced:
            ahead = self.tokens[self.at : self.at + 3]
            if len(ahead) == 3 and ahead[1].text == "/" and ahead[2].kind == "number":
                above, below = Num(Fraction(ahead[0].text)), Num(Fraction(ahead[2].text))
                if _proper(above, below):
                    self.at += 3
                    return Num(Fraction(token) + above.value / below.value, "mixed")
        digits = 0 if whole else len(token.replace(".", "").lstrip("0"))
        return Num(Fraction(token), "integer" if whole else "decimal", digits)

    def subscripted(self, name: str) -> Node:
        """A symbol with the subscript that follows it, if any."""
        if self.next == "_":
            self.take()
            start = self.at
            self.argument(whole=True) if self.kind != "text" else self.take()
            name += "_" + "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
        return Sym(name)

    def choose(self, above: Node) -> Node:
        """The binomial coefficient `{n \\choose k}`, or its argument where no `\\choose` follows."""
        if self.next != "\\choose":
            return above
        self.take()
        return Op("binom", (above, self.relation()))

    def bracketed(self, opening: str) -> Node:
        """What is inside a bracket whose opening sign is consumed: a group of items, an interval, a matrix, or a single expression."""
        bars, self.bars = self.bars, 0
        items = self.sequence()
        self.bars = bars
        closing = self.take()
        if closing not in (")", "]"):
            raise UnknownNotation
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        if opening == "[" and closing == "]" and all(isinstance(i, Compound) and i.kind == "[]" for i in items):
            return Compound("matrix", tuple(Compound("row", i.items) for i in items if isinstance(i, Compound)))
        return Compound(opening + closing, tuple(items))

    def matrix(self, begin: str) -> Node:
        """The rows of an environment whose beginning is consumed: a matrix, a determinant, or cases."""
        kind = begin.partition("{")[2].partition("}")[0].rstrip("*")
        rows: list[list[Node]] = [[]]
        while self.kind != "end":
            if self.next == "\\\\":
                self.take()
                rows.append([])
            elif self.next == "&":
                self.take()
            else:
                rows[-1].append(self.relation())
        self.take()
        kinds = {"vmatrix": "determinant", "cases": "cases"}
        made = tuple(Compound("row", tuple(row)) for row in rows if row)
        return Compound(kinds.get(kind, "matrix"), made)

    def command(self, token: str) -> Node:
        """The expression that a LaTeX command, which is consumed, begins."""
        if token == "\\frac":
            return Op("div", (self.argument(), self.argument()))
        if token == "\\binom":
            return Op("binom", (self.argument(), self.argument()))
        if token == "\\sqrt":
            index: Node = Num(Fraction(2))
            if self.next == "[":
                self.take()
                index = self.sum()
                self.take("]")
            return Op("root", (self.bracketed(self.take()) if self.next == "(" else self.argument(), index))
        if token in ("\\lfloor", "\\lceil", "\\langle"):
            return self.delimited(token)
        if token in _BIG:
            start = self.at
            while self.at < len(self.tokens) and self.next not in (",", ")", "]", "}", "\\}") and self.next not in ("=", "<", ">"):
                self.skip()
            return Op(token, (Sym("".join(t.text for t in self.tokens[start : self.at])),))
        if token in ("\\bmod", "\\mod"):
            return Op("mod", (self.argument(whole=True),))
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in _STYLES:
            start = self.at
            inner = self.argument(whole=True)
            if token in _FACES and not isinstance(inner, Sym):
                return inner
            return self.subscripted(token + "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}"))
        if token in ("\\angle", "\\triangle", "\\mathrm"):
            return self.argument(whole=True)
        if re.fullmatch(r"\\[a-zA-Z]+", token):
            return self.subscripted(token)
        raise UnknownNotation

    def skip(self) -> None:
        """Skip one token, or a whole bracket."""
        depth = 0
        while True:
            token = self.take()
            depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
            if not depth:
                return

    def delimited(self, opening: str) -> Node:
        """A floor, ceiling or tuple between delimiters, of which the opening one is consumed."""
        closing = {"\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\langle": "\\rangle"}[opening]
        items = self.sequence()
        self.take(closing)
        if opening == "\\langle":
            return Compound("()", tuple(items))
        if len(items) != 1:
            raise UnknownNotation
        return Op({"\\lfloor": "floor", "\\lceil": "ceil"}[opening], (items[0],))

    def function(self, name: str) -> Node:
        """`\\sin^2 x`, `\\log_2 8`, `\\max(1, 2)`; without brackets, its argument ends before an operator or another function."""
        base: Node | None = None
        power: Node | None = None
        while self.next in ("^", "_"):
            if self.take() == "^":
                power = self.argument(whole=True)
            else:
                base = self.argument(whole=True)
        if self.next == "(":
            self.take()
            args = tuple(self.sequence())
            self.take(")")
        else:
            factors = [self.factor(signed=True)]
            while self.starts_factor() and self.next not in ("(", "[", "\\{", "\\begin") and self.next[1:] not in FUNCTIONS:
                factors.append(self.factor())
            args = (_product(factors),)
        name = {"lg": "log", "Re": "re", "Im": "im"}.get(name, name)
        if name == "log" and base is None:
            base = Num(Fraction(10))
        if name == "exp" and len(args) == 1:
            return Op("pow", (Sym("e"), args[0]))
        if name == "sqrt" and len(args) == 1:
            return Op("root", (args[0], Num(Fraction(2))))
        if power == Num(Fraction(-1)):
            name, power = "arc" + name, None
        called: Node = Op(name, args if base is None else (*args, base))
        return called if power is None else Op("pow", (called, power))


def _negative(node: Node) -> Node:
    if isinstance(node, Num) and node.value > 0:
        return Num(-node.value, node.kind, node.digits)
    if isinstance(node, Quantity):
        return Quantity(_negative(node.amount), node.unit)
    return Op("neg", (node,))


def _product(factors: list[Node]) -> Node:
    if len(factors) == 1:
        return factors[0]
    if any(isinstance(f, (Text, Relation)) for f in factors):
        raise UnknownNotation
    return Op("mul", tuple(factors))


def _proper(above: Node, below: Node) -> bool:
    return all(isinstance(n, Num) and n.kind == "integer" for n in (above, below)) and 0 < above.value < below.value  # type: ignore[union-attr]


def _digits_of(node: Node) -> str:
    if isinstance(node, Num):
        return str(node.value)
    raise UnknownNotation


def _repeating(token: str) -> Fraction:
    whole, _, rest = token.partition(".")
    once, _, again = rest.partition("\\")
    again = re.sub(r"\D", "", again)
    start = Fraction(int(whole + once or 0), 10 ** len(once))
    return start + Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))


def _scientific(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if abs(int(exponent)) > 1000:
        raise NotationError("too large")
    return Fraction(mantissa) * Fraction(10) ** int(exponent)


def _base(subscript: str) -> int:
    word = re.sub(r"\\text|[{}]", "", subscript)
    if word in NUMBERS:
        return NUMBERS.index(word)
    if not word.isdigit():
        raise UnknownNotation
    return int(word)
