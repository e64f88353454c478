"""Python in a sandbox: what it may do, and that it cannot do more, take more, or last longer."""

from __future__ import annotations

import pytest

from ramet.agents.tree import ToolStatus
from ramet.errors import ConfigError
from ramet.tools.python import python_tool
from tests.tools.calling import call

pytestmark = pytest.mark.anyio
DONE, FAILED, TIMED_OUT = ToolStatus.DONE, ToolStatus.FAILED, ToolStatus.TIMED_OUT
python = python_tool(seconds=0.5)


async def test_code_is_run_and_what_it_prints_and_its_value_come_back():
    cases = {
        "1 + 2": "3",
        "print('a')\nprint('b')\n[1, 2]": "a\nb\n[1, 2]",
        "x = 5": "",
        "def f(n):\n  return n if n < 2 else f(n - 1) + f(n - 2)\nf(15)": "610",
        "import math, re, json\njson.dumps({'a': math.comb(5, 2), 'b': re.findall('[0-9]', 'a1b2')})": '\'{"a": 10, "b": ["1", "2"]}\'',
        "import time\ntime.sleep(10**6)": "",
        "'<|im_end|>'": "'<|im_end|>'",
    }
    for code, value in cases.items():
        assert await call(python, code=code) == (DONE, value), code
    assert await call(python, code="import random\nrandom.random()") == await call(python, code="import random\nrandom.random()")


async def test_nothing_is_kept_between_calls():
    assert (await call(python, code="kept = 1"))[0] is DONE
    status, text = await call(python, code="print('before')\nkept")
    assert status is FAILED and text.startswith("before\n") and text.endswith("NameError: name 'kept' is not defined")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("open('/etc/passwd').read()", "PermissionError"),
        ("from pathlib import Path\nPath('/tmp/x').write_text('x')", "PermissionError"),
        ("import os\nos.system('true')", "AttributeError"),
        ("import os\nos.environ['HOME']", "not supported"),
        ("import socket", "ModuleNotFoundError"),
        ("import subprocess", "ModuleNotFoundError"),
        ("import ctypes", "ModuleNotFoundError"),
        ("import ramet", "ModuleNotFoundError"),
        ("().__class__.__bases__[0].__subclasses__()", "AttributeError"),
        ("input()", "NameError"),
        ("exit()", "NameError"),
        ("raise SystemExit(3)", "Error"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("(" * 50_000 + ")" * 50_000, "too deeply nested"),
        ("9**9**9", "MemoryError"),
        ("'x' * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append('y' * 1000)", "MemoryError"),
        ("while True: print('y' * 1000)", "MemoryError"),
    ],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_it_may_not_do_is_what_it_is_told(code, said):
    status, text = await call(python, code=code)
    assert status is FAILED and said in text


async def test_code_ends_when_its_time_is_up_and_a_worker_that_does_not_is_killed():
    late = (TIMED_OUT, "not done within 0.5 seconds")
    assert await call(python, code="while True:\n  try:\n    while True: pass\n  except BaseException: pass") == late
    # One operation of the interpreter, which looks at its clock between two.
    assert await call(python, code="10 ** (10**7) % 7") == late
    assert await call(python, code="2 + 2") == (DONE, "4")


def test_limits_that_cannot_be_meant_are_refused():
    for options in ({"seconds": 0}, {"seconds": float("inf")}, {"memory": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            python_tool(**options)
