"""Tools and programs, right and wrong ones, as somebody else would write them."""

from __future__ import annotations

import os
import signal

import ramet


@ramet.tool(cost=2)
async def count(text: str) -> int:
    """Count the rows of a text. It ends the process at the call whose number is in the environment."""
    with open("calls", "a") as calls:
        calls.write("+")
    if os.path.getsize("calls") == int(os.environ.get("KILLED_AT_CALL", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return len(text.splitlines())


def plain(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


async def half(branch):
    await branch.call("count", text="one row")
    keys = list(branch.task.documents)
    await branch.spawn([{"objective": "sum", "context_keys": keys[: len(keys) // 2 or 1], "role": "adder"}], free=True)
    await branch.finish()


async def served(branch):
    result = await branch.call("add", a=40, b=2)
    branch.answer(result.text)


def not_async(branch):
    pass


async def of_two(branch, other):
    pass


class Holder:
    pass


number = 3


def undocumented(x: int) -> int:
    return x


def count_again(text: str) -> int:
    """Another of the same name."""


count_again.__name__ = "count"


async def fails(branch):
    return 1 / 0
