r"""Mathematical notation, as models and data sets write it, read into a tree: LaTeX, plain text, and both at once.

`read` keeps what was written: nothing is evaluated, so that the form of an answer can be told from its value. What is not plain
from the characters is read as its author will have meant it:

- `12,345` is a number and `12, 345` a list; inside brackets every comma separates;
- `2\frac{1}{2}` and `2 1/2` are mixed numbers, `2\frac{x}{2}` is a product;
- `AB` is one name and not a product, `ab` is a product, a word is a text;
- what follows a number in words is its unit; `5 m` is a quantity, `5m` a product;
- `1/2x` is `x/2`; `x^10` is a tenth power; `\frac12` is a half.

The time that reading takes is linear in the text, whose length and depth are limited. Balanced text that is no notation known here
is kept as it is written; `NotationError` is raised for the rest.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ramet.errors import NotationError, UnknownNotation
from ramet.rewards.algebra.lexing import FUNCTIONS, WORD_COMMANDS, Token, cleaned, plain_words, tokens_of
from ramet.rewards.algebra.trees import Group, Node, Num, Op, Quantity, Relation, Sym, Text, depth_of, written
from ramet.rewards.algebra.units import CURRENCIES, MULTIPLES, NUMBER_WORDS, NUMBERS, unit_name

DEEPEST = 60
AS_WRITTEN = "as written "
"""How the words of a `Text` begin that is only equal as it is written."""
_BIG = frozenset(("\\sum", "\\prod", "\\int", "\\iint", "\\iiint", "\\oint", "\\lim", "\\sup", "\\inf", "\\bigcup", "\\bigcap"))
_STYLES = frozenset((
    "\\mathbf", "\\mathit", "\\mathcal", "\\mathbb", "\\vec", "\\hat", "\\bar", "\\overline", "\\underline", "\\widehat",
    "\\overrightarrow", "\\boldsymbol", "\\bm", "\\mathsf", "\\mathfrak", "\\tilde", "\\overset", "\\stackrel",
))  # fmt: skip
_FACES = frozenset(("\\mathbf", "\\mathit", "\\boldsymbol", "\\bm", "\\mathsf", "\\underline"))
_SHORT_WORDS = frozenset((
    "no", "yes", "odd", "all", "any", "none", "one", "two", "six", "ten", "sun", "mon", "tue", "wed", "thu", "fri", "sat", "red", "may",
))  # fmt: skip
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "~", "\\in": "in", "\\equiv": "==", "\\to": "->",
    "\\cong": "cong",
}  # fmt: skip
_DEGREE = (Sym("\\circ"), Sym("°"))
_AFTER_FACTOR = frozenset((
    ")", "]", "}", "\\}", ",", ";", "+", "-", "*", "/", ":", "^", "_", "!", "\\cup", "\\cap", "\\setminus", "&", "\\\\", "%", "\\%",
    "°", "'", "\\pmod",
))  # fmt: skip
_ALL_REALS = frozenset(("all real numbers", "all reals", "the real numbers", "the set of all real numbers", "the set of real numbers"))
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_ASIDE = re.compile(r"\s+\((?:(?!base\b)[^\W\d_]{2,}(?:[ ,.'-]+[^\W\d_]+)*[.,]?|(?:since|because|as|from)\s[^()]*)\)$")


def read(text: str) -> Node:
    """The tree of a text. Raises `NotationError`."""
    text = cleaned(text)
    if not text:
        raise NotationError("nothing is said")
    found = _words(text) or _clock(text) or _parsed(text)
    if depth_of(found) > 2 * DEEPEST:
        raise NotationError("nested too deep")
    return found


def _words(text: str) -> Node | None:
    """Of a text of words only; letters that name choices are symbols."""
    bare = re.sub(rf"\\(?:{WORD_COMMANDS})\s*\{{([^{{}}]*)\}}", r"\1", text).strip()
    choice = re.fullmatch(r"(?:[oO]ption\s+|[cC]hoice\s+)?\(?([A-Z])[).]?", bare)
    if choice:
        return Sym(choice[1])
    if bare.casefold() in NUMBERS:
        return Num(Fraction(NUMBERS.index(bare.casefold())))
    marked = bare != text
    if not re.fullmatch(r"[^\W\d_]+(?:[\s,.'&-]+[^\W\d_]+)*[\s.!?]*", bare):
        return None
    if plain_words(bare) in _ALL_REALS:
        return Sym("\\mathbbR")
    words = re.findall(r"[^\W\d_']+", bare)
    if len(words) == 1 and (len(bare) == 1 or (not marked and _reads_as_symbols(words[0]))):
        return None
    if not marked and all(len(word) == 1 or (len(word) < 3 and _reads_as_symbols(word)) for word in words):
        return None
    return Text(plain_words(bare))


def _reads_as_symbols(word: str) -> bool:
    return (word.isupper() or len(word) <= 3) and word.casefold() not in _SHORT_WORDS


def _clock(text: str) -> Node | None:
    """A time of day that says a.m. or p.m."""
    bare = re.sub(rf"\\(?:{WORD_COMMANDS})\s*\{{([^{{}}]*)\}}", r"\1", text).strip()
    match = _CLOCK.fullmatch(bare)
    if match is None or not 1 <= int(match[1]) <= 12:
        return None
    return Text(f"clock {int(match[1]) % 12 + 12 * (match[3] in 'pP')}:{match[2] or '00'}")


def _parsed(text: str) -> Node:
    aside = _ASIDE.search(text)
    if aside and re.search(r"\d", text[: aside.start()]):
        text = text[: aside.start()]
    text = re.sub(r"^\(([0-9A-F]+)\)(?=_)", r"\1", text)
    based = re.fullmatch(r"([0-9][0-9A-F]*)\s*,?\s*\(?(?:in\s+)?base[\s-]*(\d+)\)?", text)
    if based:
        return Text(f"base {int(based[2])}: {based[1]}")
    if re.fullmatch(r"-?[\d.]+(?:\s+-?[\d.]+)+", text):
        return Text(" ".join(text.split()))  # numbers side by side are neither one number nor a product
    tokens = tokens_of(text)
    _check_balance(tokens)
    signs = [t.text for t in tokens if t.text in ("\\pm", "\\mp")]
    try:
        if not signs:
            return _Parser(tokens).whole()
        both = [_Parser([_signed(t, swap) for t in tokens]).whole() for swap in (False, True)]
        return Group("list", tuple(item for node in both for item in _items(node)))
    except UnknownNotation:
        return Text(AS_WRITTEN + "".join(t.text for t in tokens))


def _items(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Group) and node.kind == "list" else (node,)


def _signed(token: Token, swap: bool) -> Token:
    if token.text not in ("\\pm", "\\mp"):
        return token
    return Token("sign", "-" if (token.text == "\\pm") == swap else "+", token.spaced)


def _check_balance(tokens: list[Token]) -> None:
    """Raises `NotationError` for brackets that do not match or nest too deep. Intervals may open with one kind and close with another."""
    opened: list[str] = []
    for token in tokens:
        if token.kind == "begin" or token.text in ("{", "\\{", "(", "["):
            opened.append("b" if token.kind == "begin" else "(" if token.text in "([" else token.text)
            if len(opened) > DEEPEST:
                raise NotationError("nested too deep")
        elif token.kind == "end" or token.text in ("}", "\\}", ")", "]"):
            wanted = "b" if token.kind == "end" else "(" if token.text in ")]" else {"}": "{", "\\}": "\\{"}[token.text]
            if not opened or opened.pop() != wanted:
                raise NotationError(f"{token.text} closes nothing")
    if opened:
        raise NotationError(f"{opened[-1]} is not closed")


class _Parser:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.bars = 0

    @property
    def next(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        if self.at >= len(self.tokens) or (wanted and self.next != wanted):
            raise UnknownNotation
        self.at += 1
        return self.tokens[self.at - 1].text

    def whole(self) -> Node:
        found = self.sequence()
        if self.at < len(self.tokens):
            raise UnknownNotation
        return found[0] if len(found) == 1 else Group("list", tuple(found))

    def sequence(self) -> list[Node]:
        """Items between commas."""
        found = [self.relation()]
        while self.next in (",", ";"):
            while self.next in (",", ";"):  # a comma before "and" is no empty item
                self.take()
            found.append(self.relation())
        return found

    def relation(self) -> Node:
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
        parts = [self.union()]
        while self.next == ":":
            self.take()
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else Group("ratio", tuple(parts))

    def union(self) -> Node:
        found, operator = [self.sum()], ""
        while self.next in ("\\cup", "\\cap", "\\setminus") and operator in ("", self.next):
            operator = self.take()
            found.append(self.sum())
        return found[0] if not operator else Group({"\\cup": "union"}.get(operator, operator), tuple(found))

    def sum(self) -> Node:
        terms: list[Node] = []
        while True:
            sign = self.sign()
            term = self.term()
            terms.append(_negative(term) if sign == "-" else term)
            if self.next not in ("+", "-"):
                return terms[0] if len(terms) == 1 else Op("add", tuple(terms))

    def sign(self) -> str:
        sign = ""
        while self.next in ("+", "-"):
            sign = "-" if (self.take() == "-") != (sign == "-") else "+"
        return sign

    def term(self) -> Node:
        """Products and quotients, left to right; then the unit."""
        found = self.factor()
        product = [found]
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
        if self.at >= len(self.tokens) or self.kind in ("text", "end"):
            return False
        if self.next == "|":
            return not self.bars
        return (
            self.next not in _AFTER_FACTOR and self.next not in _RELATIONS and not self.next.startswith(("\\rfloor", "\\rceil", "\\rangle"))
        )

    def factor(self, signed: bool = False) -> Node:
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
        """Powers of powers are read from the right."""
        parts = [self.argument(whole=True)]
        while self.next == "^":
            self.take()
            parts.append(self.argument(whole=True))
        found = parts.pop()
        while parts:
            found = Op("pow", (parts.pop(), found))
        return found

    def argument(self, whole: bool = False) -> Node:
        """A brace group or one token: one digit of a number, all of it if `whole`."""
        if self.next == "{":
            self.take()
            found = self.relation()
            self.take("}")
            return found
        if self.kind == "number" and not whole:
            token = self.tokens[self.at]
            if len(token.text) > 1 and token.text[0] != ".":
                self.tokens[self.at] = Token("number", token.text[1:], False)
                return Num(Fraction(token.text[0]))
        if self.next in ("-", "+"):
            return _negative(self.primary()) if self.sign() == "-" else self.primary()
        return self.primary()

    def primary(self) -> Node:
        self.depth += 1
        if self.depth > 2 * DEEPEST:
            raise NotationError("nested too deep")
        found = self._primary()
        self.depth -= 1
        return found

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
            found = self.choose(items[0]) if len(items) == 1 else Group("{}", tuple(items))
            self.take("}")
            return found
        if token == "\\{":
            items = [] if self.next == "\\}" else self.sequence()
            self.take("\\}")
            return Group("{}", tuple(items)) if items else Sym("\\emptyset")
        if token == "|":
            self.bars += 1
            found = self.sum()
            self.bars -= 1
            self.take("|")
            return Op("abs", (found,))
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
        if self.next == "_":
            self.take()
            start = self.at
            self.argument(whole=True) if self.kind != "text" else self.take()
            name += "_" + "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
        return Sym(name)

    def choose(self, above: Node) -> Node:
        if self.next != "\\choose":
            return above
        self.take()
        return Op("binom", (above, self.relation()))

    def bracketed(self, opening: str) -> Node:
        bars, self.bars = self.bars, 0
        items = self.sequence()
        self.bars = bars
        closing = self.take()
        if closing not in (")", "]"):
            raise UnknownNotation
        if len(items) == 1 and opening + closing in ("()", "[]"):
            return items[0]
        if opening == "[" and closing == "]" and all(isinstance(i, Group) and i.kind == "[]" for i in items):
            return Group("matrix", tuple(Group("row", i.items) for i in items if isinstance(i, Group)))
        return Group(opening + closing, tuple(items))

    def matrix(self, begin: str) -> Node:
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
        made = tuple(Group("row", tuple(row)) for row in rows if row)
        return Group(kinds.get(kind, "matrix"), made)

    def command(self, token: str) -> Node:
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
        """One token, or all of a bracket."""
        depth = 0
        while True:
            token = self.take()
            depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
            if not depth:
                return

    def delimited(self, opening: str) -> Node:
        closing = {"\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "\\langle": "\\rangle"}[opening]
        items = self.sequence()
        self.take(closing)
        if opening == "\\langle":
            return Group("()", tuple(items))
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


def _base(said: str) -> int:
    word = re.sub(r"\\text|[{}]", "", said)
    if word in NUMBERS:
        return NUMBERS.index(word)
    if not word.isdigit():
        raise UnknownNotation
    return int(word)
