"""Is a stated mathematical answer equivalent to the reference? Decided by math-verify, in a process that can be stopped.

What is equal as written, or as a number, is decided here. The rest is parsed by a computer algebra system, which model
text can keep busy for ever (`9**9**9`): it runs in a worker process with a time limit, and is killed past it. An answer that
cannot be verified in time is not equivalent; `Verifier.expired` counts them.
"""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
from dataclasses import dataclass, field
from fractions import Fraction

from ramet.agents.protocol import last_boxed
from ramet.agents.tree import Task
from ramet.errors import RewardError, TaskError

MAX_CHARACTERS = 500
"""Longer answers are not parsed: no reference is a tenth as long."""
SECONDS = 5.0
START_SECONDS = 60.0
_NUMBER = re.compile(r"([+-]?\d{1,30}(?:\.\d{1,30})?)(?:/(\d{1,30}))?")


def plain(text: str) -> str:
    """The answer without what does not belong to it: a box, dollar signs, `x =` of one letter, a final full stop, spaces."""
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).replace("\u2212", "-").replace("\\!", "").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text.replace("\\left", "").replace("\\right", ""))
    text = re.sub(r"^\s*[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    return re.sub(r"\s+", "", text).removesuffix(".")


def number(text: str) -> Fraction | None:
    """The value of a plain integer, decimal or fraction; None for anything else."""
    match = _NUMBER.fullmatch(plain(text))
    if match is None:
        return None
    below = int(match.group(2) or 1)
    return Fraction(match.group(1)) / below if below else None


def reference(task: Task) -> str:
    """The task's reference answer. Raises `TaskError` where there is none."""
    if not isinstance(task.reference, str) or not task.reference.strip():
        raise TaskError(f"task {task.id} has no reference answer; add one or choose another reward")
    return task.reference


def math_match(task: Task, answer: str | None) -> float:
    """1.0 if the answer is equivalent to the reference."""
    gold = reference(task)
    if answer is None or len(answer) > MAX_CHARACTERS:
        return 0.0
    if plain(answer) == plain(gold):
        return 1.0
    ours, theirs = number(answer), number(gold)
    if ours is not None and theirs is not None:
        return float(ours == theirs)
    return float(_shared().equivalent(gold, answer))


@dataclass
class Verifier:
    """One worker process that compares, started when it is first needed and again when it had to be killed."""

    seconds: float = SECONDS
    expired: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def equivalent(self, gold: str, answer: str) -> bool:
        """Raises `RewardError` if the worker cannot run at all."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            process.stdin.flush()
            reply = self._line(process, self.seconds)
        except OSError:
            reply = b""
        if reply in (b"0", b"1"):
            return reply == b"1"
        self.expired += 1  # too slow, or it has crashed on this answer: deep recursion, memory
        self.close()
        return False

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ramet.rewards.verify"]
        self._process = process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        said = self._line(process, START_SECONDS)
        if said != b"ready":
            self.close()
            raise RewardError(f"the process that verifies maths does not start ({said.decode() or 'no answer'}); pip install 'ramet[data]'")
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """One line of the worker within so many seconds; empty if there is none."""
        assert process.stdout is not None
        return process.stdout.readline().strip() if select.select([process.stdout], [], [], seconds)[0] else b""

    def close(self) -> None:
        """Kill the worker."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_VERIFIER: Verifier | None = None


def expired() -> int:
    """How many answers of this process could not be verified in time."""
    return 0 if _VERIFIER is None else _VERIFIER.expired


def _shared() -> Verifier:
    global _VERIFIER
    if _VERIFIER is None:
        _VERIFIER = Verifier()
        atexit.register(_VERIFIER.close)
    return _VERIFIER
