"""The worker of `ramet.rewards.maths`: reads `[reference, answer]` lines, says 1 or 0 to each. `python -m ramet.rewards.verify`"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any

MEMORY = 2**32
"""Bytes of address space: what a term grows to must not take the machine down."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(error, flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            equal = verify(_parsed(parse, gold), _parsed(parse, answer))
        except Exception:  # the algebra system raises many classes for text that is no mathematics
            equal = False
        print(int(equal), flush=True)


def _parsed(parse: Any, text: str) -> Any:
    """As it stands if it marks its mathematics, else as one formula."""
    return parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None)


if __name__ == "__main__":
    main()
