"""Programs: Python in the place of the model's decisions, on the same ledger and into the same tree.

    async def map_reduce(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "Add these rows.", "each": ["*"], "per_clone": 2}])
        await branch.finish()

    tree = await runtime.run(task, budget, program=map_reduce)

What a program writes in the model's place (a call, an answer) is a turn of the tree: charged as if it had been sampled, marked as
`written`, never trained. With `free=True` it is context instead, costs what reading it costs, and is counted in `Turn.free`.
Where the budget ends in the middle of a program, so does the program, and the branch is out of budget.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
from pydantic import ValidationError

from ramet.agents.actor import grow, run_branch
from ramet.agents.attempts import room_left, sample_turn
from ramet.agents.calls import ParsedTurn
from ramet.agents.dispatch import Replies, make_calls, reply_ids, run_calls
from ramet.agents.growth import Growth, Setting
from ramet.agents.protocol import CloneResult, Objective, SpawnClone, ToolUse, explain, render_call
from ramet.agents.tree import Branch, Status, StopReason, Task, ToolResult, Turn
from ramet.errors import AnswerError, BudgetExhausted, CallError, ProgramError, RametError, first_line

Program = Callable[["ProgramBranch"], Awaitable[Any]]
"""What it returns, if it is not None and nothing has been answered, is the answer."""


class ProgramBranch:
    """The root of a tree in the hands of a program."""

    def __init__(self, setting: Setting, growth: Growth, task: Task):
        self.task = task
        self._setting, self._growth = setting, growth

    @property
    def id(self) -> str:
        """The branch's place in the tree: "0" for the root."""
        return self._growth.id

    @property
    def left(self) -> Mapping[str, float]:
        """What may still be spent, by currency; what is not named is unlimited."""
        return self._growth.ledger.remaining()

    @property
    def clones(self) -> Sequence[Branch]:
        """The clones of all calls so far, in call order."""
        return [clone for turn in self._growth.turns for clone in turn.clones]

    async def sample(self, max_tokens: int | None = None) -> ParsedTurn:
        """Let the model write the next turn, of `max_tokens` at most. Its calls are read and not made (`make`)."""
        self._opened()
        room, limit = room_left(self._setting, self._growth.ledger, len(self._growth.ids), final=False)
        room = room if max_tokens is None else min(room, max_tokens)
        if room <= 0:
            raise BudgetExhausted(limit, 1, 0)
        sample = await sample_turn(self._setting, self._growth, room, final=False)
        return self._setting.chat.parse(sample.ids)

    async def make(self, turn: ParsedTurn) -> None:
        """Make the calls of a turn that `sample` gave, and tell the model what they gave."""
        if not turn.calls and not turn.error:
            raise ProgramError("this turn makes no call; answer it with tell(...), or end with answer(...)")
        self._reply(await make_calls(self._setting, self._growth, turn, run_branch))

    async def finish(self) -> str | None:
        """Let the model go on from here as if there were no program, to its end; its answer."""
        self._opened()
        await grow(self._setting, self._growth)
        return self._growth.answer

    async def spawn(
        self, objectives: Sequence[str | Objective | Mapping[str, Any]], context_keys: Sequence[str] = (), *, free: bool = False
    ) -> list[CloneResult]:
        """Start clones as the model does (`ramet.agents.protocol`) and wait for them; their results in order.

        The call and the results become part of the branch's context. Raises `ProgramError` for what is no call.
        """
        try:
            call = SpawnClone.model_validate({"objectives": list(objectives), "context_keys": list(context_keys)})
            call.requests(self._setting.store)
        except (ValidationError, CallError) as error:
            raise ProgramError(f"this cannot be spawned: {explain(error) if isinstance(error, ValidationError) else error}") from error
        if not self._setting.may_spawn(self._growth.depth):
            raise ProgramError("the budget allows no clones here: see its depth, clones and width")
        written = [item if isinstance(item, str) else item.model_dump(exclude_unset=True) for item in call.objectives]
        self._write("", render_call(written, context_keys), free)
        replies = await run_calls(self._setting, self._growth, [call], run_branch)
        self._reply(replies)
        return list(replies.replies[0].results)

    async def call(self, tool: str, /, *, free: bool = False, **arguments: Any) -> ToolResult:
        """Call a tool as the model does; its result, which becomes part of the branch's context."""
        held = self._setting.tools.held(self._growth.depth)
        if tool not in held:
            raise ProgramError(f"this branch holds no tool {tool!r}; it holds {', '.join(held) or 'none'}")
        use = ToolUse(tool, json.dumps(arguments, ensure_ascii=False))
        self._write("", f'{{"name":{json.dumps(tool)},"arguments":{use.arguments}}}', free)
        self._reply(await run_calls(self._setting, self._growth, [use], run_branch))
        return self._growth.turns[-1].calls[-1].result

    def tell(self, text: str) -> None:
        """Answer a sampled turn with a message of your own, as a tool's result is given."""
        turns = self._growth.turns
        if not turns or turns[-1].appended:
            raise ProgramError("there is no sampled turn to answer: tell(...) comes after sample()")
        self._growth.append(self._setting.chat.after_turn(text, closed=turns[-1].stop is StopReason.END))

    def answer(self, answer: Any, *, free: bool = False) -> None:
        """End the branch with this answer: text, or a value of the task's type. Raises `ProgramError` if it does not fit that type."""
        text, value = str(answer), None
        if self._growth.expects is not None:
            try:
                value, text = self._growth.expects.check(answer)
            except AnswerError as error:
                raise ProgramError(str(error)) from error
        self._write(f"Answer: {text}", None, free)
        self._growth.value = value
        self._growth.end(Status.ANSWERED, text)

    def _opened(self) -> None:
        if self._growth.status is not None:
            raise ProgramError("this branch has answered already")
        if self._growth.turns and not self._growth.turns[-1].appended:
            raise ProgramError("the turn that was sampled last is not answered: make(turn) its calls, or tell(...) first")

    def _write(self, text: str, call: str | None, free: bool) -> None:
        """A turn in the model's place."""
        self._opened()
        ids = tuple(self._setting.chat.turn(text, call))
        if free:
            self._growth.turns.append(Turn((), (), StopReason.END, version=self._setting.policy.version, appended=ids, free=len(ids)))
            return
        with self._growth.ledger.reserve(len(ids), 0) as grant:
            grant.settle(len(ids), 0)
        zeros = (0.0,) * len(ids)
        self._growth.turns.append(Turn(ids, zeros, StopReason.END, version=self._setting.policy.version, written=True))

    def _reply(self, replies: Replies) -> None:
        ids = reply_ids(self._setting, self._growth, replies, len(self._growth.ids))
        if ids is None:
            raise BudgetExhausted("context", 1, 0)
        self._growth.append(ids)


def steer(program: Program, setting: Setting, growth: Growth, task: Task) -> Callable[[], Awaitable[None]]:
    """`program` as what decides for a root. What it raises that is not about the budget or the backend is a `ProgramError`."""

    async def run() -> None:
        branch = ProgramBranch(setting, growth, task)
        try:
            value = await program(branch)
        except (RametError, anyio.get_cancelled_exc_class()):
            raise
        except Exception as error:
            raise ProgramError(f"the program of task {task.id} raised {type(error).__name__}: {first_line(error)}") from error
        if growth.status is None:
            if value is not None:
                branch.answer(value)
            else:
                growth.end(Status.EMPTY)

    return run
