"""What others say of a pair: the rule that Hendrycks' MATH is usually graded by, written anew, and math-verify.

`python -m tests.rewards.other_rules` writes both verdicts into the table of pairs, and lists what is to be decided.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

TABLE = Path(__file__).with_name("maths_pairs.jsonl")


def hendrycks(reference: str, answer: str) -> int:
    """Equal as strings, once both are in one spelling."""
    return int(_spelling(reference) == _spelling(answer))


def _spelling(text: str) -> str:
    for old, new in (
        ("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""),
        ("^\\circ", ""), ("\\$", ""),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = text.split("\\text{ ")[0] if text.count("\\text{ ") == 1 else text  # a unit
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, value = text.partition("=")
    text = value if equals and "=" not in value and len(name) <= 2 else text
    text = re.sub(r"\\sqrt(?!\{)(.)", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac(?!\{)(.)(?!\{)(.)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(?!\{)(.)(?=\{)", r"\\frac{\1}", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def math_verify(reference: str, answer: str) -> int:
    """Each as it stands if it marks its mathematics, else as one formula."""
    from math_verify import parse, verify

    def parsed(text: str) -> object:
        return parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None)

    return int(verify(parsed(reference), parsed(answer), timeout_seconds=None))


def main() -> None:
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        pair = row["reference"], row["answer"]
        row |= {"hendrycks": hendrycks(*pair), "math_verify": math_verify(*pair)}
        agreed = row["hendrycks"] == row["math_verify"] == row["equal"]
        if not agreed and not row.get("decided"):
            print(f"to be decided: {pair}")
    TABLE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
