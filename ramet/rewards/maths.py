r"""Grades a stated mathematical answer: is it equivalent to the reference?

Both are read into trees (`algebra.notation`) that are compared in value and form (`algebra.equality`); plain numbers directly. Nothing
is searched, simplified or evaluated as code: the time is bounded by the length of the text, and all functions are thread-safe. Text that
cannot be read, and values that are too large to compute, do not count as answers.

An expression copied from the question is no answer to it: an answer that is equal to the reference but written differently (`\sqrt{72}` for
`6\sqrt{2}`), must not occur in the question. tests/rewards/maths_pairs.jsonl lists what counts as equal, case by case.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ramet.agents.tree import Task
from ramet.errors import NotationError, TaskError
from ramet.rewards.algebra.equality import same
from ramet.rewards.algebra.lexing import LONGEST, WORD_COMMANDS, cleaned, plain_words
from ramet.rewards.algebra.notation import AS_WRITTEN, read
from ramet.rewards.algebra.trees import Node, Quantity, Sym, Text, number_of, written
from ramet.rewards.algebra.units import NUMBER_WORDS

_PLAIN = re.compile(r"\s*\$?\s*([+-]?\d{1,300}(?:\.\d{1,300})?)\s*\$?\s*\.?\s*")
_FORMULA = re.compile(r"(?<!\\)\$\$?([^$]+?)(?<!\\)\$\$?|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,/:-])-?(?:\\?\$)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?![\w/:]|[.,]\d)")
_AFFIRMING = frozenset(("is", "are", "was", "and", "to", "then", "equals", "equal", "about", "approximately", "through"))
_DOUBT = NUMBER_WORDS - _AFFIRMING | frozenset((
    "nor", "never", "cannot", "can't", "isn't", "aren't", "wasn't", "doesn't", "don't", "didn't", "won't", "neither", "either", "perhaps",
    "least", "most", "under", "above", "below", "almost", "nearly", "up", "dozen", "twice", "by", "percent", "a.m", "p.m", "am", "pm",
    "base", "mod", "modulo",
))  # fmt: skip
_STATED = re.compile(r"([^\W\d_](?:[^\d\\$=<>]|\$[^\d$=<>]{1,40}\$)*\b(?:is|are|equals))\s+(\S.*)", re.DOTALL)
_CONTINUED = re.compile(r"[,;]|\s(?:and|in|on|at|as|by|for|from|with|when|because|so)\s")
_SENTENCE = re.compile(r"\s*[A-Z][a-z]+(?:,?\s+(?:\$|\\\(|[a-z])|,?\s+[A-Z][a-z])")
_BECAUSE = re.compile(r",?\s(?:because|since)\s")
_CHOICE = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(?!(?:or|and|is|are|nor)\b)([^\s.,;].*)", re.DOTALL)
_ANSWER_IS = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore)\b,?\s*)?the\s+(?:final\s+|correct\s+|right\s+|best\s+)*(?:answer|option|choice)\s+is\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ()\[\]]|[\s$]")


def number(text: str) -> Fraction | None:
    """The value of an integer, decimal, fraction, mixed number or the like; None for anything else, words and units included."""
    plain = _PLAIN.fullmatch(text)
    if plain:
        return Fraction(plain[1])
    try:
        value = number_of(read(text)) if re.search(r"\d", text) else None
    except NotationError:
        return None
    return None if value is None else value.value


def canonical(answer: str) -> str:
    """A canonical form: the same text for answers that are written alike and for equal numbers, units aside."""
    try:
        node = read(answer)
    except NotationError:
        return " ".join(answer.split())
    while isinstance(node, Quantity):
        node = node.amount
    value = number_of(node)
    return written(node) if value is None else str(value.value)


def reference(task: Task) -> str:
    """The task's reference answer. Raises `TaskError` where there is none."""
    if not isinstance(task.reference, str) or not task.reference.strip():
        raise TaskError(f"task {task.id} has no reference answer; add one or choose another reward")
    return task.reference


def parse_reference(text: str, where: str) -> Node:
    """The reference as a tree. Raises `TaskError`, naming `where`, if it cannot be read as mathematical notation."""
    try:
        return read(text)
    except NotationError as error:
        shown = text if len(text) <= 60 else text[:60] + "…"
        raise TaskError(f"{where}: its reference answer {shown!r} cannot be read ({error}); mend it or leave the row out") from None


def math_match(task: Task, answer: str | None) -> float:
    """1.0 if the answer is equivalent to the reference. Raises `TaskError` for a reference that cannot be read."""
    gold = reference(task)
    if not isinstance(answer, str):
        return 0.0
    ours, theirs = _PLAIN.fullmatch(gold), _PLAIN.fullmatch(answer)
    if ours and theirs and len(gold) < 15 and len(answer) < 15:
        return float(Fraction(ours[1]) == Fraction(theirs[1]))
    expected = parse_reference(gold, f"task {task.id}")
    if len(answer) > LONGEST:
        return 0.0
    answer = answer[sentence.end() :] if (sentence := _ANSWER_IS.match(answer)) else answer
    if isinstance(expected, Text) and expected.words == plain_words(cleaned(answer)):
        return 1.0
    if isinstance(expected, Sym) and (chosen := _choice(answer)):
        return float(expected.name == chosen)
    stated = _understood(answer, prose=not isinstance(expected, Text))
    if stated is None:
        return 0.0
    try:
        equal = same(expected, stated)
    except NotationError:
        return 0.0
    return float(equal and (written(expected) == written(stated) or not _copied(answer, task)))


def _understood(answer: str, prose: bool) -> Node | None:
    """The tree of the answer or, with `prose`, of the one number or formula that a sentence affirms; None if neither can be read."""
    whole: Node | None = None
    answer = _BECAUSE.split(answer, maxsplit=1)[0]
    stated = _in_prose(answer) if prose else []
    for text in (*stated, answer) if _SENTENCE.match(answer) else (answer, *stated):
        try:
            node = read(text)
        except NotationError:
            continue
        if not (isinstance(node, Text) and node.words.startswith(AS_WRITTEN)):
            return node
        whole = whole or node
    return whole


def _in_prose(text: str) -> list[str]:
    """Texts to read: the only formula of a sentence, or its only number with and without its unit; [] where several or doubts are."""
    text = re.sub(rf"\\(?:{WORD_COMMANDS})\s*\{{([^{{}}]*)\}}", r" \1 ", text).replace("**", "")
    matches = [*_FORMULA.finditer(text)] or [*_NUMBER.finditer(text)]
    formula = bool(matches) and matches[0].re is _FORMULA
    around = (_FORMULA if formula else _NUMBER).sub(" ", text)
    words = re.findall(r"[^\W\d_][^\W\d_']*", around.casefold())
    stated = _STATED.fullmatch(text)
    if stated and not _DOUBT & set(stated[1].casefold().split()):
        return [stated[2]]
    if len(matches) != 1 or not any(len(word) > 1 for word in words) or re.search(r"[\d\\^=<>*/+]", around) or _DOUBT & set(words):
        return []
    if formula:
        return [text[matches[0].start() :], matches[0].group()]
    unit = _CONTINUED.split(text[matches[0].end() :], maxsplit=1)[0]
    return [matches[0].group() + unit, matches[0].group()]


def _choice(answer: str) -> str | None:
    """The letter of a choice that is given with its text, such as `(C) 12` or `B. Paris`."""
    text = re.sub(rf"\\(?:{WORD_COMMANDS})\s*\{{([^{{}}]*)\}}", r"\1", cleaned(answer)) if len(answer) <= LONGEST else ""
    match = _CHOICE.fullmatch(text)
    return None if match is None or re.search(r"\([A-Z]\)|\b[A-Z][.):](?:\s|$)", match[3]) else match[1] or match[2]


def _copied(answer: str, task: Task) -> bool:
    """Whether the question contains the answer."""
    formula = "".join(squeezed(cleaned(answer)).split())
    question = squeezed(task.messages[-1].content) if task.messages else ""
    pattern = r"\s*".join(map(re.escape, formula))
    return len(formula) > 1 and re.search(rf"(?<![\w.^]){pattern}(?!\w|\s*\^|\.\d)", question) is not None


def squeezed(text: str) -> str:
    """The text without what does not change the meaning of a formula, such as spacing."""
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\1\2/\3\4", text)
    text = _SPACING.sub(" ", text).replace("{", "").replace("}", "")
    return text.replace("\\cdot", "*").replace("\\times", "*").replace("\u2212", "-")
