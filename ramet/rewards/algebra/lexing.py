"""From characters to tokens: what is not part of a formula is dropped; runs of letters are split into names, functions and words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ramet.agents.answers import unboxed
from ramet.errors import NotationError
from ramet.rewards.algebra.units import SHORT_UNITS, SMALL_UNITS

LONGEST = 1000
"""Characters; longer texts are not read."""
FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp", "det",
    "gcd", "lcm", "max", "min", "arg", "deg", "dim", "Re", "Im", "sgn", "sqrt", "abs",
))  # fmt: skip
WORD_COMMANDS = "text|textbf|textit|textrm|textsf|textnormal|mbox|hbox|mathrm|rm|operatorname|unit|textsc"
_LITTLE = frozenset(("a", "an", "per", "of", "the", "in", "each", "for", "on", "at", "by", "old", "more", "less", "left"))
_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "*", "·": "*", "⋅": "*", "\u2217": "*", "÷": "/", "\u2044": "/", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "≈": "\\approx ", "∈": "\\in ", "\u222a": "\\cup ", "∩": "\\cap ", "±": "\\pm ", "∓": "\\mp ", "π": "\\pi ",
    "∞": "\\infty ", "√": "\\sqrt ", "°": "^\\circ ", "∅": "\\emptyset ", "¢": " cents", "²": "^2 ", "³": "^3 ", "½": " 1/2", "¼": " 1/4",
    "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "θ": "\\theta ", "\u03b1": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ",
    "\u211d": "\\mathbb{R}", "\u2019": "'", "\u2018": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\uff0c": ", ",
    "。": ".",
}  # fmt: skip
_SAME = {
    "\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/", "\\leq": "\\le", "\\leqslant": "\\le", "\\geq": "\\ge",
    "\\geqslant": "\\ge", "\\lt": "<", "\\gt": ">", "\\neq": "\\ne", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac",
    "\\dbinom": "\\binom", "\\tbinom": "\\binom", "\\varnothing": "\\emptyset", "\\degree": "°", "\\lbrace": "\\{", "\\rbrace": "\\}",
    "\\lparen": "(", "\\rparen": ")", "\\lbrack": "[", "\\rbrack": "]", "\\lvert": "|", "\\rvert": "|", "\\vert": "|", "\\mid": "|",
    "\\sim": "\\approx", "\\simeq": "\\approx", "\\land": ",", "\\lor": ",", "\\dots": "…", "\\ldots": "…", "\\cdots": "…",
    "\\colon": ":", "\\infin": "\\infty", "\\exponentialE": "e", "\\imaginaryI": "i", "\\varphi": "\\phi",
    "\\varepsilon": "\\epsilon", "\\backslash": "\\setminus",
}  # fmt: skip
_TOKEN = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<repeating>\d*\.\d*\\overline\{\d+\}|\d*\.\d*\\bar\{\d+\}|\d*\.\d*\\dot\{\d+\})"
    r"|(?P<based>[0-9][0-9A-F]*_(?:\d|\{\d+\}|\{\\text\{[a-z]+\}\})|[A-F][0-9A-F]*_(?:\{16\}))"
    r"|(?P<scientific>\d+(?:\.\d+)?[eE][-+]?\d+(?![\d.]))"
    r"|(?P<thousands>[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?)"
    r"|(?P<number>\d+(?:\.\d+)?|\.\d+|\d+\.(?!\.))"
    r"|(?P<dots>\.\.\.)"
    rf"|\\(?:{WORD_COMMANDS})\s*\{{(?P<text>[^{{}}]*)\}}"
    r"|(?P<begin>\\begin\{[a-zA-Z]*\*?\}(?:\{[^{}]*\}|\[[^\]]*\])?)|(?P<end>\\end\{[a-zA-Z]*\*?\})"
    r"|(?P<command>\\[a-zA-Z]+|\\[\\{}|$%&])"
    r"|(?P<letters>[^\W\d_]+(?:['-][^\W\d_]{2,})*'*)"
    r"|(?P<sign><=|>=|!=|==|\*\*|.)",
    re.DOTALL,
)
_DROPPED = re.compile(
    r"\\(?:(?:left|middle|right)(?![a-zA-Z])\.?|(?:[bB]igg?[lr]?|displaystyle|textstyle|tiny|small|large|Large|LARGE|huge|Huge|bf|limits"
    r"|checkmark|qed|blacksquare)(?![a-zA-Z])|(?:hspace|phantom|(?:text)?color)\{[^{}]*\})|<<[^<>]*>>"
)
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{\s*,\s*\}|,\s*\\!\s*|\\,|[ \u00a0\u2009\u202f])\d{3})+(?!\d)")


def cleaned(text: str) -> str:
    """The text without box, mathematics delimiters, emphasis, spacing commands and final full stop; Unicode signs become LaTeX."""
    if len(text) > LONGEST:
        raise NotationError(f"{len(text)} characters")
    text = unboxed(text)
    text = "".join(_SIGNS.get(c, chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else c) for c in text)
    if "\\begin" not in text:
        text = re.sub(r"\\{2,}(?=[a-zA-Z])", r"\\", text)  # as in a string of JSON
    text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = re.sub(r"(?<!\\)(?:\\!|\\[()\[\]])", "", text)
    text = re.sub(r"(?<!\\)\\[,;: >]|\\q?quad(?![a-zA-Z])|~", " ", text)
    text = _DROPPED.sub("", text)
    text = re.sub(r"\\\\\[-?[\d.]+ *[a-z]+\]", r"\\\\", text)  # the height of a row
    text = re.sub(r"\\big(cup|cap)(?![a-zA-Z]|\s*[_^])", r"\\\1 ", text)
    text = re.sub(r"(?<=[)\]}])\s*U\s*(?=[(\[])", r" \\cup ", text)
    text = re.sub(rf"\\(?:{WORD_COMMANDS})\s*\{{(?=[^{{}}]*\d)([^{{}}]*)\}}", r" \1 ", text)
    text = re.sub(r"\(\s*mod\s*(\d+)\s*\)", r"\\pmod{\1}", text)
    text = re.sub(r"^\s*(?:negative|minus)\s+(?=\d)", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*(?:\\[a-z]+\{)?\s*([CF])\}?(?![a-zA-Z])", r" \\text{degrees \1}", text)
    text = re.sub(r"(?<![^\W_])(?:(US)D?|(EUR)|(GBP))\s*\\?\$?(?=\s*\d)", lambda m: "\\$" if m[1] else "€" if m[2] else "£", text)
    text = re.sub(r"(?<![^\W_])(?:[a-zA-Z]\.){2,}", lambda match: match.group().replace(".", ""), text)  # U.S., p.m.
    text = re.sub(r"(?<==)(\s*)\*\*([^*\s][^*]*)\*\*(?=[\s.,;:]|$)", r"\1\2", text)
    text = _dollars(text)
    for _ in range(3):
        text = re.sub(r"^=(?!=)", "", text.strip().strip("`").rstrip(".,;:")).strip()
        if len(text) > 4 and text.startswith("**") and text.endswith("**"):
            text = text[2:-2]
        elif len(text) > 2 and text[0] == text[-1] == '"':
            text = text[1:-1]
    return text


def _dollars(text: str) -> str:
    """Without the dollar signs that delimit mathematics; one that stands for money becomes `\\$`."""
    bare = re.findall(r"(?<!\\)\$", text)
    if len(bare) % 2:
        text = re.sub(r"(?<!\\)\$(?=\s*-?[\d.])", r"\\$", text, count=1)
    return re.sub(r"(?<!\\)\$", " ", text) if bare else text


def plain_words(text: str) -> str:
    """The words of a text in lower case, separated by single spaces, without commands and punctuation."""
    text = re.sub(rf"\\(?:{WORD_COMMANDS})(?![a-zA-Z])", " ", text)
    return " ".join(re.sub(r"[^\w+/*^=<>|-]+", " ", text).casefold().split())


@dataclass(frozen=True, slots=True)
class Token:
    """One token. `kind` is a group of `_TOKEN`, or a symbol; `spaced`: whether a space precedes it."""

    kind: str
    text: str
    spaced: bool


def tokens_of(text: str) -> list[Token]:
    """The tokens of a text that `cleaned` returned. Every character belongs to a token or is whitespace."""
    tokens: list[Token] = []
    spaced, depth, position = False, 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None
        kind, token = match.lastgroup or "", match.group()
        position = match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "thousands" and depth:
            kind, token = "number", token.partition(",")[0]
            position = match.start() + len(token)
        if kind == "number" and token.endswith("."):
            token = token[:-1]
        if kind == "text":
            token = match["text"].strip()
        if kind == "command":
            token = _SAME.get(token, token)
        token = {"**": "^", "<=": "\\le", ">=": "\\ge", "!=": "\\ne", "==": "="}.get(token, token) if kind == "sign" else token
        depth += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        tokens += _lettered(token, spaced, tokens, text, position) if kind in ("letters", "text") else [Token(kind, token, spaced)]
        spaced = False
    return tokens


def _lettered(run: str, spaced: bool, before: list[Token], text: str, position: int) -> list[Token]:
    """Tokens of a run of letters or of a `\\text`: a unit or other words, a function, or symbols."""
    word = run.strip()
    if word in ("and", "or", ", and", ", or", "and ", "or "):
        return [Token("sign", ",", spaced)]
    if word in FUNCTIONS:
        return [Token("command", "\\" + word, spaced)]
    if word in ("pi", "infinity", "infty"):
        return [Token("command", "\\pi" if word == "pi" else "\\infty", spaced)]
    if word in ("i", "e", "π"):
        return [Token("symbol", word, spaced)]
    if not word or (word in ("st", "nd", "rd", "th") and before and before[-1].kind == "number" and not spaced):
        return []
    after_number = bool(before) and (before[-1].kind in ("number", "thousands", "text", "repeating") or before[-1].text in ("}", ")", "%"))
    last = not re.search(r"\w", re.sub(r"^\s*\^\{?[23]\}?", "", text[position:]))
    if text[position - 1] == "}":  # the end of a `\\text`
        return [Token("symbol" if re.fullmatch(r"[A-Z]", word) else "text", word, spaced)]
    if re.fullmatch(r"[^\W\d_]", word):
        unit = after_number and spaced and ((word in SMALL_UNITS and last) or (word == "a" and re.match(r"\s+[a-z]{3,}", text[position:])))
        speed = after_number and spaced and re.match(r"/[a-z]+\s*$", text[position:]) and word in SMALL_UNITS
        return [Token("text" if unit or speed else "symbol", word, spaced)]
    if word in SHORT_UNITS or (word in _LITTLE and after_number and spaced):
        return [Token("text" if after_number else "symbol", word, spaced)]
    if (len(word) >= 4 and not word.isupper()) or (len(word) >= 3 and after_number and spaced):
        return [Token("text", word, spaced)]
    name = next((f for f in sorted(FUNCTIONS, key=len, reverse=True) if word.startswith(f)), None)
    if name and len(name) > 1:
        return [Token("command", "\\" + name, spaced), *_lettered(word[len(name) :], False, before, text, position)]
    if word.rstrip("'").isupper():
        return [Token("symbol", word, spaced)]
    stem = word.rstrip("'")
    return [Token("symbol", c + ("'" * (len(word) - len(stem)) if i == len(stem) - 1 else ""), spaced) for i, c in enumerate(stem)]
