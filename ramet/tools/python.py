"""Python that a model writes, run in a sandbox: an interpreter without files, network or processes, in a worker process of its own.

No runtime holds this tool unless it is given to it. What the code may do, and in which time and memory, is the interpreter's to see to
(pydantic-monty); a worker that does not keep to it is killed. Each call has a worker of its own, and nothing is kept between calls.
"""

from __future__ import annotations

import math

from pydantic_monty import (
    CollectString,
    Monty,
    MontyCrashedError,
    MontyError,
    MontyRuntimeError,
    MontySyntaxError,
    OSPolicy,
    ResourceLimits,
)

from ramet.agents.tools import Tool, tool
from ramet.agents.tree import ToolResult, ToolStatus
from ramet.errors import ConfigError, first_line

MAX_OUTPUT = 2**20
"""Bytes that a call may print."""
_GRACE_SECONDS = 1.0


def python_tool(*, seconds: float = 5.0, memory: int = 64) -> Tool:
    """The tool `python`. `seconds` of running time and mebibytes of `memory` are what one call may take."""
    if not 0 < seconds < math.inf:
        raise ConfigError(f"tool python: seconds is a positive number, not {seconds}")
    if memory < 1:
        raise ConfigError(f"tool python: memory is a number of mebibytes, at least 1, not {memory}")

    @tool(timeout=seconds + 5 * _GRACE_SECONDS, max_characters=20_000)
    def python(code: str) -> ToolResult:
        """Run Python code: what it prints, and the value of its last line if that is an expression.

        Each run begins anew. There are no files and no network, and of the modules only math, re, json, datetime, itertools, collections,
        random and a few like them; a generator function (yield) is not understood.
        """
        return run(code, seconds, memory)

    return python


def run(code: str, seconds: float, memory: int) -> ToolResult:
    """Run `code` in a worker of its own: what it printed, and its value or what it raised."""
    late = f"not done within {seconds:g} seconds"
    printed = CollectString(max_bytes=MAX_OUTPUT)
    limits = ResourceLimits(max_feed_duration_secs=seconds, max_memory=memory * 2**20, max_recursion_depth=200)
    policy = OSPolicy(sleep="zero", random_start={"seed": 0})
    try:
        with Monty(max_processes=1, request_timeout=seconds + _GRACE_SECONDS) as pool:
            with pool.checkout(limits=limits, os_policy=policy) as session:
                value = session.feed_run(code, print_callback=printed)
        shown = "" if value is None else repr(value)
    except (MontyRuntimeError, MontySyntaxError) as error:
        if str(error).startswith("TimeoutError: feed time limit exceeded"):  # it says how long it took, which is never the same
            return ToolResult(ToolStatus.TIMED_OUT, _lines(printed.output, late))
        return ToolResult(ToolStatus.FAILED, _lines(printed.output, error.display()))
    except MontyCrashedError as error:
        if error.timed_out:
            return ToolResult(ToolStatus.TIMED_OUT, _lines(printed.output, late))
        return ToolResult(ToolStatus.FAILED, _lines(printed.output, "the sandbox has died"))
    except (MontyError, RecursionError) as error:
        return ToolResult(ToolStatus.FAILED, _lines(printed.output, f"{type(error).__name__}: {first_line(error)}"))
    return ToolResult(ToolStatus.DONE, _lines(printed.output, shown))


def _lines(*parts: str) -> str:
    return "\n".join(part.rstrip("\n") for part in parts if part)
