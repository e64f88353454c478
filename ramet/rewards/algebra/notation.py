r"""Reads mathematical notation as models and data sets write it (LaTeX, plain text, or a mixture) into a tree.

`read` keeps what was written: nothing is evaluated, so that the form of an answer can be compared apart from its value. Ambiguous
notation is read as its author most probably meant it:

- `12,345` is a number and `12, 345` a list; inside brackets every comma separates;
- `2\frac{1}{2}` and `2 1/2` are mixed numbers, `2\frac{x}{2}` is a product;
- `AB` is one name and not a product, `ab` is a product, a word is a text;
- what follows a number in words is its unit; `5 m` is a quantity, `5m` a product;
- `1/2x` is `x/2`; `x^10` is a tenth power; `\frac12` is a half.

Reading takes time linear in the text, whose length and depth are limited. Balanced text in an unknown notation is kept as it is
written; `NotationError` is raised for the rest.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ramet.errors import NotationError, UnknownNotation
from ramet.rewards.algebra.lexing import WORD_COMMANDS, Token, cleaned, plain_words, tokens_of
from ramet.rewards.algebra.parser import DEEPEST, Parser
from ramet.rewards.algebra.trees import Compound, Node, Num, Sym, Text, depth_of
from ramet.rewards.algebra.units import NUMBERS

AS_WRITTEN = "as written "
"""How the words of a `Text` begin that is only equal as it is written."""
_SHORT_WORDS = frozenset((
    "no", "yes", "odd", "all", "any", "none", "one", "two", "six", "ten", "sun", "mon", "tue", "wed", "thu", "fri", "sat", "red", "may",
))  # fmt: skip
_ALL_REALS = frozenset(("all real numbers", "all reals", "the real numbers", "the set of all real numbers", "the set of real numbers"))
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_ASIDE = re.compile(r"\s+\((?:(?!base\b)[^\W\d_]{2,}(?:[ ,.'-]+[^\W\d_]+)*[.,]?|(?:since|because|as|from)\s[^()]*)\)$")


def read(text: str) -> Node:
    """The tree of a text. Raises `NotationError` for text that is too long, nested too deep or unbalanced."""
    text = cleaned(text)
    if not text:
        raise NotationError("the text is empty")
    tree = _words(text) or _clock(text) or _parsed(text)
    if depth_of(tree) > 2 * DEEPEST:
        raise NotationError("nested too deep")
    return tree


def _words(text: str) -> Node | None:
    """The node of a text that consists of words only; letters that name choices are symbols. None for any other text."""
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
    """The node of a time of day with a.m. or p.m.; None for any other text."""
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
            return Parser(tokens).whole()
        both = [Parser([_signed(t, swap) for t in tokens]).whole() for swap in (False, True)]
        return Compound("list", tuple(item for node in both for item in _items(node)))
    except UnknownNotation:
        return Text(AS_WRITTEN + "".join(t.text for t in tokens))


def _items(node: Node) -> tuple[Node, ...]:
    return node.items if isinstance(node, Compound) and node.kind == "list" else (node,)


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
