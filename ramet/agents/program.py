"""Programs: Python in the place of the model's decisions, on the same ledger and into the same tree.

    async def map_reduce(branch: ProgramBranch) -> None:
        await branch.spawn([{"objective": "Add these rows.", "each": ["*"], "per_clone": 2}])
        await branch.finish()

    tree = await runtime.run(task, budget, program=map_reduce)

What a program writes in the model's place (a call, an answer) is a turn of the tree: charged as if it had been sampled, marked as
`written`, never trained. With `free=True` it is context instead, costs what reading it costs, and is counted in `Turn.free`.
What a program decides without writing it (to start `attempts`, to take one of them as its end) costs nothing by itself.
Where the budget ends in the middle of a program, so does the program, and the branch is out of budget.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import anyio
from pydantic import ValidationError

from ramet.agents.actor import grow, run_branch, stated_answer
from ramet.agents.attempts import room_left, sample_turn
from ramet.agents.budget import Budget, Fork
from ramet.agents.calls import ParsedTurn
from ramet.agents.dispatch import ClonePlan, Replies, Shares, check_roles, make_calls, plans_of, reply_ids, run_calls, run_clones
from ramet.agents.growth import Growth, Setting
from ramet.agents.protocol import CloneResult, Objective, SpawnClone, ToolUse, explain, render_call, render_results
from ramet.agents.tasks import cancelled_from_outside
from ramet.agents.tree import Branch, Message, Status, StopReason, Task, ToolResult, Turn
from ramet.errors import AnswerError, BudgetExhausted, CallError, ProgramError, RametError, first_line

Program = Callable[["ProgramBranch"], Awaitable[Any]]
"""What it returns, if nothing has been answered, is the answer: a value, or the branch of a clone (`ProgramBranch.adopt`)."""


class ProgramBranch:
    """The root of a tree in the hands of a program."""

    def __init__(self, setting: Setting, growth: Growth, task: Task):
        self.task = task
        self._setting, self._growth = setting, growth
        self._busy = self._full = False
        self.fault: Exception | None = None
        """What was raised by the backend or the runtime, while the program waited."""
        self._fork: Fork | None = None

    @property
    def id(self) -> str:
        """The branch's place in the tree: "0" for the root."""
        return self._growth.id

    @property
    def left(self) -> Mapping[str, float]:
        """What may still be spent, by currency; what is not named is unlimited."""
        return self._growth.ledger.remaining()

    @property
    def budget(self) -> Budget:
        """The limits of the tree."""
        return self._setting.budget

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
        with self._alone():
            sample = await sample_turn(self._setting, self._growth, room, final=False)
        return self._setting.chat.parse(sample.ids)

    def begin(self, text: str, *, call: bool = False) -> None:
        """Begin the model's next turn with `text`, or with `text` and the opening of a call, which the model then has to make.

        It is charged as if the model had sampled it, and not trained.
        """
        self._opened()
        turn = self._setting.chat.turn
        silent = _common(turn(text), turn(text, "{}"))
        ids = _common(turn(text, "[]"), turn(text, "{}")) if call else silent
        if call and len(ids) <= len(silent):
            raise ProgramError("in this chat format nothing opens a call; write a whole one with spawn(...) or call(...)")
        self._growth.begun = tuple(ids)

    async def make(self, turn: ParsedTurn) -> None:
        """Make the calls of a turn that `sample` gave, and tell the model what they gave."""
        if not turn.calls and not turn.error:
            raise ProgramError("this turn makes no call; answer it with tell(...), or end with accept() or answer(...)")
        if self._unanswered() is None:
            raise ProgramError("this turn has been answered already")
        self._outside()
        with self._alone():
            self._reply(await make_calls(self._setting, self._growth, turn, run_branch))

    async def finish(self, *, spawn: bool = True) -> str | None:
        """Let the model go on from here as if there were no program, to its end, without clones unless it may `spawn`; its answer."""
        self._opened()
        setting = self._setting
        if not spawn:
            setting = replace(setting, budget=setting.budget.model_copy(update={"depth": self._growth.depth}))
        with self._alone():
            await grow(setting, self._growth)
        return self._growth.answer

    async def spawn(
        self,
        objectives: Sequence[str | Objective | Mapping[str, Any]],
        context_keys: Sequence[str] = (),
        *,
        text: str = "",
        keep: int | None = None,
        answer_reserve: int | None = None,
        free: bool = False,
    ) -> list[CloneResult]:
        """Start clones as the model does (`ramet.agents.protocol`) and wait for them; their results in order.

        The call and the results become part of the branch's context. `text` stands before the call. Clones share what is left, but for
        the `keep` generated tokens that stay with this branch, and each keeps `answer_reserve` of its share for its answer; None: both
        as the budget has it. Raises `ProgramError` for what is no call.
        """
        call, _ = self._read(objectives, context_keys)
        written = [item if isinstance(item, str) else item.model_dump(exclude_unset=True) for item in call.objectives]
        self._write(text, render_call(written, context_keys), free)
        replies = await self._made([call], Shares(keep, answer_reserve))
        return list(replies.replies[0].results)

    async def attempts(
        self,
        prompts: int | Sequence[str | Objective | Mapping[str, Any]] | Sequence[Sequence[Message]] = 1,
        *,
        keep: int | None = None,
        answer_reserve: int | None = None,
    ) -> list[Branch]:
        """Start contexts that know nothing of this one, side by side, and wait for them; how they ended, in order.

        prompts               how many read the task as this branch does; or objectives, as for `spawn`; or messages for each
        keep, answer_reserve  as for `spawn`

        Nothing is written, and nothing becomes part of this branch's context. They are its clones in every account, one level below it.
        """
        plans = self._plans(prompts, Shares(keep, answer_reserve).setting(self._setting))
        with self._alone(), nullcontext(self._fork) if self._fork is not None else Fork(self._growth.ledger) as fork:
            another = bool(fork.ledgers)
            fork.add([plan.max_tokens for plan in plans], 0, keep, answer_reserve)
            return list(await run_clones(self._growth, fork, plans, run_branch, called=another))

    def _plans(
        self, prompts: int | Sequence[str | Objective | Mapping[str, Any]] | Sequence[Sequence[Message]], setting: Setting
    ) -> list[ClonePlan]:
        if isinstance(prompts, int) and prompts > 0:
            self._may_spawn()
            return [ClonePlan(setting, self.task.messages, expects=self._growth.expects)] * prompts
        if isinstance(prompts, int | str) or not prompts or not all(prompts):
            raise ProgramError("attempts(...) takes a number from 1 up, or a list of objectives, or of lists of messages")
        if any(isinstance(prompt, str | Objective | Mapping) for prompt in prompts):
            return plans_of(setting, self._read(prompts)[1], system=False)
        self._may_spawn()
        return [ClonePlan(setting, prompt) for prompt in prompts]  # type: ignore[arg-type]

    def _read(self, objectives: Sequence[Any], context_keys: Sequence[str] = ()) -> tuple[SpawnClone, list[Objective]]:
        """Objectives as a call, and one for each clone."""
        try:
            call = SpawnClone.model_validate({"objectives": list(objectives), "context_keys": list(context_keys)})
            requests, _ = call.requests(self._setting.store)
            check_roles(self._setting, requests)
        except (ValidationError, CallError) as error:
            raise ProgramError(f"this cannot be spawned: {explain(error) if isinstance(error, ValidationError) else error}") from error
        self._may_spawn()
        return call, requests

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """In this block, `attempts` that are started one after another count as if they ran side by side.

        For attempts of which none depends on another's result: of all of them, the longest counts as `critical_path`.
        """
        self._ready()
        if self._fork is not None:
            raise ProgramError("side_by_side() holds for all of its block already")
        try:
            with Fork(self._growth.ledger) as self._fork:
                yield
        finally:
            self._fork = None

    async def call(self, tool: str, /, *, free: bool = False, **arguments: Any) -> ToolResult:
        """Call a tool as the model does; its result, which becomes part of the branch's context."""
        held = self._setting.tools.held(self._growth.depth)
        if tool not in held:
            raise ProgramError(f"this branch holds no tool {tool!r}; it holds {', '.join(held) or 'none'}")
        use = ToolUse(tool, json.dumps(arguments, ensure_ascii=False))
        self._write("", f'{{"name":{json.dumps(tool)},"arguments":{use.arguments}}}', free)
        await self._made([use], Shares())
        return self._growth.turns[-1].calls[-1].result

    def tell(self, text: str) -> None:
        """Answer a sampled turn with a message of your own, as a tool's result is given."""
        ids = self._setting.chat.after_turn(text, closed=self._sampled("tell(...)").stop is StopReason.END)
        self._fits(len(ids))
        self._growth.append(ids)

    def accept(self) -> str | None:
        """End the branch with what the turn that was sampled last answers; that answer."""
        turn = self._sampled("accept()")
        text = self._setting.chat.parse(turn.sampled).text
        answer, wrong = stated_answer(self._growth, text, finished=turn.stop is StopReason.END)
        if turn.stop is not StopReason.END:
            self._growth.end(Status.OUT_OF_BUDGET, answer, f"a turn of {len(turn.sampled)} tokens was cut")
        else:
            self._growth.end(Status.EMPTY if answer is None else Status.ANSWERED, answer, wrong)
        return answer

    def text_of(self, clone: Branch) -> str:
        """What a clone said in its last turn, without its thoughts and its calls."""
        chat = self._setting.of(clone.role).chat if clone.role in self._setting.roles else self._setting.chat
        return chat.parse(clone.turns[-1].sampled).text if clone.turns else ""

    def listed(self, clones: Sequence[Branch]) -> str:
        """How clones ended, a line each, as a branch reads it that has called for them."""
        results = [CloneResult(clone.status, clone.answer, clone.reason) for clone in clones]
        return render_results(results, "", self._setting.result_characters)

    def adopt(self, clone: Branch) -> None:
        """End the branch as a clone has ended: with its status, its answer, its reason. Nothing is written or charged."""
        self._ready()
        answer, value = clone.answer, clone.value
        if answer is not None and value is None:
            answer, value = self._of_type(answer)
        self._growth.value = value
        self._growth.end(clone.status, answer, clone.reason)

    def answer(self, answer: Any, *, free: bool = False) -> None:
        """End the branch with this answer: text, or a value of the task's type. Raises `ProgramError` if it does not fit that type.

        It needs no room in the context; after results that had none, the branch is out of budget, and this is its answer.
        """
        text, value = self._of_type(answer)
        if self._full:
            self._ready()
            self._growth.value = value
            self._growth.end(Status.OUT_OF_BUDGET, text, "context")
            return
        self._write(f"Answer: {text}", None, free)
        self._growth.value = value
        self._growth.end(Status.ANSWERED, text)

    def _of_type(self, answer: Any) -> tuple[str, Any]:
        """An answer as text, and as a value of the type that the task asks for, if it does."""
        if self._growth.expects is None:
            return str(answer), None
        try:
            value, text = self._growth.expects.check(answer)
        except AnswerError as error:
            raise ProgramError(str(error)) from error
        return text, value

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the branch does one thing, it does no other."""
        self._ready()
        self._busy = True
        try:
            yield
        except Exception as error:
            self.fault = error
            raise
        finally:
            self._busy = False

    def _ready(self) -> None:
        if self._busy:
            raise ProgramError("a branch does one thing at a time: await the last one first; attempts(...) and spawn(...) start several")
        if self._growth.status is not None:
            raise ProgramError("this branch has answered already")

    def _opened(self) -> None:
        self._ready()
        self._outside()
        if self._full:
            raise BudgetExhausted("context", 1, 0)
        if self._unanswered() is not None:
            raise ProgramError("the turn that was sampled last is not answered: make(turn) its calls, tell(...) or accept() first")

    def _outside(self) -> None:
        if self._fork is not None:
            raise ProgramError("only attempts(...) run in a block of side_by_side()")

    def _unanswered(self) -> Turn | None:
        """The turn that was sampled last, if nothing has been said after it."""
        for turn in reversed(self._growth.turns):
            if turn.appended or not turn.started:
                return None if turn.appended else turn
        return None

    def _sampled(self, what: str) -> Turn:
        self._ready()
        turn = self._unanswered()
        if turn is None:
            raise ProgramError(f"there is no sampled turn to answer: {what} comes after sample()")
        return turn

    def _may_spawn(self) -> None:
        if not self._setting.may_spawn(self._growth.depth):
            raise ProgramError("the budget allows no clones here: see its depth, clones and width")

    def _write(self, text: str, call: str | None, free: bool) -> None:
        """A turn in the model's place."""
        self._opened()
        ids = tuple(self._setting.chat.turn(text, call))
        if call is not None:
            self._fits(len(ids))
        if free:
            self._growth.turns.append(Turn((), (), StopReason.END, version=self._setting.policy.version, appended=ids, free=len(ids)))
            return
        with self._growth.ledger.reserve(len(ids), 0) as grant:
            grant.settle(len(ids), 0)
        zeros = (0.0,) * len(ids)
        self._growth.turns.append(Turn(ids, zeros, StopReason.END, version=self._setting.policy.version, written=len(ids)))

    async def _made(self, calls: Sequence[SpawnClone | ToolUse], shares: Shares) -> Replies:
        """Make calls that are written already, and append their replies."""
        with self._alone():
            # Calls that are refused at once wait for nothing: a program that makes no others could not be stopped.
            await anyio.lowlevel.checkpoint()
            replies = await run_calls(self._setting, self._growth, calls, run_branch, shares)
            self._reply(replies)
        return replies

    def _reply(self, replies: Replies) -> None:
        ids = reply_ids(self._setting, self._growth, replies, len(self._growth.ids))
        if ids is None:
            self._full = True
            raise BudgetExhausted("context", 1, 0)
        self._growth.append(ids)

    def _fits(self, more: int) -> None:
        """Raise `BudgetExhausted` if the context has no room for so many ids and a token after them."""
        context = self._setting.context
        if context is not None and (left := context - len(self._growth.ids)) <= more:
            raise BudgetExhausted("context", more, left)


def _common(ids: Sequence[int], others: Sequence[int]) -> list[int]:
    """What two sequences begin with."""
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False))]


def steer(program: Program, setting: Setting, growth: Growth, task: Task) -> Callable[[], Awaitable[None]]:
    """`program` as what decides for a root. What it raises that is not about the budget or the backend is a `ProgramError`."""

    async def run() -> None:
        branch = ProgramBranch(setting, growth, task)
        try:
            value = await program(branch)
        except RametError:
            raise
        except (Exception, SystemExit, anyio.get_cancelled_exc_class()) as error:
            if error is branch.fault or (isinstance(error, anyio.get_cancelled_exc_class()) and cancelled_from_outside()):
                raise
            raise ProgramError(f"the program of task {task.id} raised {type(error).__name__}: {first_line(error)}") from error
        if growth.status is None:
            if isinstance(value, Branch):
                branch.adopt(value)
            elif value is not None:
                branch.answer(value)
            else:
                growth.end(Status.EMPTY)

    return run
