"""Coverage-guided fuzzing of what reads untrusted text. Runs until it is stopped or finds something:

    pip install -e '.[fuzz]'
    python tests/fuzz/parsers.py -max_total_time=60 -timeout=1 -max_len=4096

Whatever comes in, each parser returns what it promises or raises its own error.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports():
    from ramet.agents.calls import parse_spelled
    from ramet.agents.context import ContextStore
    from ramet.agents.journal import Journal
    from ramet.agents.protocol import CloneResult, elide, extract_answer, parse_call, render_call, render_results
    from ramet.agents.tree import Status
    from ramet.env.arithmetic import parse_sum
    from ramet.errors import CallError, CheckpointError, TaskError

FOLDER = Path(tempfile.mkdtemp())


def call(text: str) -> None:
    try:
        requests = parse_call(text).requests(ContextStore({}))[0]
    except CallError as error:
        assert len(str(error).encode()) < 4000
    else:
        assert requests and all(request.objective.strip() for request in requests)


def spelled(text: str) -> None:
    turn = parse_spelled(text)
    assert all("</tool_call>" not in call for call in turn.calls)
    assert len(turn.text) + sum(map(len, turn.calls)) <= len(text)


def answer(text: str) -> None:
    for finished in (True, False):
        found = extract_answer(text, finished)
        assert found is None or (found == found.strip() != "" and found in text)


def results(text: str) -> None:
    answers = text.split("\0")
    lines = render_results([CloneResult(Status.ANSWERED, a) for a in answers], "[left]", 200).splitlines()
    assert len(lines) == len(answers) + 1 and lines[-1] == "[left]"
    assert len(elide(text, 60)) <= 60


def flat_sum(text: str) -> None:
    with contextlib.suppress(TaskError):
        assert parse_sum(text)


def journal(data: bytes) -> None:
    path = FOLDER / "journal.jsonl"
    path.write_bytes(data)
    try:
        with Journal(path, "fuzz"):
            pass
    except CheckpointError:
        assert path.read_bytes() == data


TEXTS = (call, spelled, answer, results, flat_sum)


def one(data: bytes) -> None:
    if not data:
        return
    which, rest = data[0] % (len(TEXTS) + 1), data[1:]
    if which == len(TEXTS):
        journal(rest)
    else:
        TEXTS[which](rest.decode("utf-8", "surrogateescape"))


def seeds() -> Path:
    """A corpus to start from: something that each parser accepts."""
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    valid = render_call([{"objective": "a", "context_keys": ["k"], "max_tokens": 3}, "b"])
    with Journal(FOLDER / "seed.jsonl", "fuzz") as written:
        written.append({"a": [1, "x"]})
    texts = [valid, f"x<tool_call>{valid}</tool_call>y", "</think>\nFinal answer: 7", "1\0two lines\n2: 3\0" + "z" * 300, "12+3-4"]
    for which, data in enumerate([*map(str.encode, texts), (FOLDER / "seed.jsonl").read_bytes()]):
        (corpus / str(which)).write_bytes(bytes([which]) + data)
    return corpus


if __name__ == "__main__":
    atheris.Setup([*sys.argv, str(seeds())], one)
    atheris.Fuzz()
