from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from ramet.agents.scripted import PlainFormat
from ramet.agents.tree import Branch, Status, StopReason, ToolCall, ToolResult, ToolStatus, Turn
from ramet.runs.show import branch_view

CHAT = PlainFormat()


def branch(name: str, said: str, *clones: Branch) -> Branch:
    ids = tuple(map(ord, said))
    return Branch(name, (), (Turn(ids, (0.0,) * len(ids), StopReason.END, clones=clones),), Status.ANSWERED, said)


def printed(root: Branch) -> list[str]:
    out = StringIO()
    Console(file=out, width=60).print(branch_view(root, CHAT))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_clones_stand_in_call_order_under_the_turn_that_started_them():
    inner = branch("0.0.0", "c")
    root = branch("0", "a", branch("0.0", "b", inner), branch("0.1", "d"))
    assert printed(root) == [
        "root 1 tokens → answered a",
        "├── a",
        "├── clone 0 1 tokens → answered b",
        "│   ├── b",
        "│   └── clone 0.0 1 tokens → answered c",
        "│       └── c",
        "└── clone 1 1 tokens → answered d",
        "    └── d",
    ]


def test_a_chain_deeper_than_the_stack_is_shown():
    root = branch("0.0", "last")
    for _ in range(2000):
        root = branch("0.0", "on", root)
    depth, view = 0, branch_view(root, CHAT)
    while len(view.children) == 2:
        depth, view = depth + 1, view.children[1]
    assert depth == 2000 and str(view.children[0].label) == "last"


def test_calls_of_tools_stand_under_their_turn_on_one_line_and_roles_beside_their_clones():
    calls = (
        ToolCall("add", '{"a": 1}', ToolResult(ToolStatus.DONE, "two\nlines"), 0),
        ToolCall("add", "x" * 400, ToolResult(ToolStatus.TIMED_OUT, "no result within 1 seconds"), 1),
    )
    clone = replace(branch("0.0", "c"), role="reader")
    root = Branch("0", (), (Turn((), (), StopReason.END, appended=(97, 98), free=1, calls=calls, clones=(clone,)),), Status.ANSWERED, "a")
    out = StringIO()
    Console(file=out, width=1000).print(branch_view(root, CHAT))
    _, written, first, second, reader, _ = [line.rstrip() for line in out.getvalue().splitlines()]
    assert written == "├── a"  # what a program wrote for free
    assert first == '├── add {"a": 1} → two lines'
    assert second.endswith("→ timed out no result within 1 seconds") and len(second) < 400
    assert reader == "└── clone 0 as reader 1 tokens → answered c"
