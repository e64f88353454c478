"""Runtime: trees of branches on one policy.

`run` grows one tree to its end. `run_many` keeps several growing and streams them as they finish; while the consumer does not take
them, no new ones are started. Works on anyio's asyncio and trio backends. The policy must be serving (entered) meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ramet.agents.actor import run_branch
from ramet.agents.budget import Budget, Ledger
from ramet.agents.chat import ChatFormat
from ramet.agents.context import ContextStore
from ramet.agents.events import Event, TreeEnded
from ramet.agents.growth import Approval, Growth, Role, Setting, seed_of
from ramet.agents.prefixes import fresh_cache
from ramet.agents.program import Program, steer
from ramet.agents.sampling import Middleware, Policy, Sampling
from ramet.agents.tasks import Slots, task_group
from ramet.agents.tools import Tool, ToolCaller, Tools, call_tool
from ramet.agents.tree import Status, StopReason, Task, Tree, price
from ramet.agents.typed import AnswerType
from ramet.errors import ConfigError, TaskError

CLONE_SYSTEM = (
    "You are a clone, working on one part of a larger task in a context of your own. "
    "Do only what is asked, briefly, and end with a line `Answer: ...`. If you cannot, say why in that line."
)


@dataclass(frozen=True, slots=True)
class Job:
    """One tree to grow. `key` identifies it to the caller; the runtime does not use it."""

    task: Task
    budget: Budget
    seed: int = 0
    key: tuple[object, ...] = ()


@dataclass(slots=True)
class Runtime:
    """Grows trees. Raises `ConfigError` for a number below 1.

    concurrency        largest number of samples in flight, over all trees
    max_turn_tokens    longest turn, in tokens, if nothing else limits it
    result_characters  longest tool message, in characters, over all results of a call
    attempts           how often a sample is attempted if it fails transiently; by default as the policy has it (24 times at a server,
                       which is three minutes or more, otherwise 4)
    clone_system       system message of every clone; none if empty
    always_show_budget state in every prompt what may be spent, not only in those of branches that hold a tool; small models mistake the
                       line for part of the question. Tool messages always state it
    watch              called with each root as it starts to grow, to display its tree or to cancel single branches
    on_end             called with each tree that has ended, failed ones and those that are grown anew included
    tools              what branches may call beside `spawn_clone`; `tools_at`: which branches hold them
    caller             makes the calls of tools; a journal puts itself there (`ramet.agents.resume.JournaledTools`)
    roles              who clones may be instead of clones of the model, by the name that a call gives
    approve            asked before each call, of tools and of `spawn_clone`; what it does not approve is refused
    middleware         what every request for a sample goes through, the first the outermost (`ramet.agents.sampling.Middleware`)
    on_cancel          called with the tree as it stood, if `run` or `stream` is cancelled from outside while it grows
    program            decides in the model's place what roots do, where `run` and `stream` are not given another
    """

    policy: Policy
    chat: ChatFormat
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int = 256
    max_turn_tokens: int = 4096
    result_characters: int = 4096
    attempts: int | None = None
    clone_system: str = CLONE_SYSTEM
    always_show_budget: bool = True
    watch: Callable[[Growth], None] | None = None
    on_end: Callable[[Tree], None] | None = None
    tools: Sequence[Tool] = ()
    tools_at: Literal["everywhere", "clones", "root"] = "everywhere"
    caller: ToolCaller = call_tool
    roles: Mapping[str, Role] = field(default_factory=dict)
    approve: Approval | None = None
    middleware: Sequence[Middleware] = ()
    on_cancel: Callable[[Tree], None] | None = None
    program: Program | None = None
    _tools: Tools = field(init=False)
    _slots: Slots | None = None

    def __post_init__(self) -> None:
        self._tools = Tools(self.tools, self.tools_at)
        for name in ("concurrency", "max_turn_tokens", "result_characters", "attempts"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ConfigError(f"{name} is {number}; give at least 1")

    async def run(
        self,
        task: Task,
        budget: Budget,
        seed: int = 0,
        prompt: list[int] | None = None,
        program: Program | None = None,
        after: Tree | None = None,
    ) -> Tree:
        """Grow one tree. After `budget.seconds` it is cut short and returned as timed out.

        prompt   token ids that replace the rendering of the task's messages, for callers that lay out the context themselves
        program  decides in the model's place what the root does (`ramet.agents.program`); by default the runtime's own
        after    a finished tree whose conversation the task's one message goes on with: the root's context is that tree's, then the message

        Raises `TaskError` if the task has no messages, or none that can follow a tree. A failure of the policy is not raised; it is in
        the tree (`Tree.failed`).
        """
        return await self._run(task, budget, seed, prompt, program, after, None)

    async def stream(
        self, task: Task, budget: Budget, seed: int = 0, program: Program | None = None, after: Tree | None = None
    ) -> AsyncGenerator[Event, None]:
        """Grow one tree, and give what happens in it as it happens; the last event has the tree. Leaving the loop cancels it.

        Nothing is lost by a slow reader: events wait for it.
        """
        send, receive = anyio.create_memory_object_stream[Event](math.inf)

        async def run() -> None:
            with send:
                tree = await self._run(task, budget, seed, None, program, after, send.send_nowait)
                send.send_nowait(TreeEnded(tree))

        # The receiver outlives the tasks: what they still tell while they are cancelled has somewhere to go.
        with receive:
            async with task_group() as group:
                group.start_soon(run)
                try:
                    async for event in receive:
                        yield event
                finally:
                    group.cancel_scope.cancel()
            # What is cancelled from outside may find the end of the events first: it must not end like a whole stream.
            await anyio.lowlevel.checkpoint_if_cancelled()

    async def _run(
        self,
        task: Task,
        budget: Budget,
        seed: int,
        prompt: list[int] | None,
        program: Program | None,
        after: Tree | None,
        emit: Callable[[Event], None] | None,
    ) -> Tree:
        if not task.messages:
            raise TaskError(f"task {task.id} has no messages")
        if self._slots is None:
            self._slots = Slots(self.concurrency)
        program = program or self.program
        ledger = Ledger.for_root(budget)
        setting = Setting(
            policy=self.policy,
            chat=self.chat,
            budget=budget,
            store=ContextStore(task.documents),
            sampling=self.sampling,
            slots=self._slots,
            seed=seed,
            group=f"{task.id}/{seed}",
            max_turn_tokens=self.max_turn_tokens,
            result_characters=self.result_characters,
            attempts=self.attempts,
            clone_system=self.clone_system,
            watched=self.watch is not None,
            always_show_budget=self.always_show_budget,
            tools=self._tools,
            caller=self.caller,
            roles=self.roles,
            approve=self.approve,
            emit=emit,
            middleware=self.middleware,
        )
        expects = None if task.answer is None else AnswerType(task.answer)
        media = tuple(segment for message in task.messages for segment in message.media)
        if after is not None:
            prompt, media = _follow_up(setting, ledger, task, after, expects), after.root.media
        root = setting.growth("0", prompt or setting.prompt(task.messages, ledger, 0, expects), ledger, media=media, expects=expects)
        if self.watch is not None:
            self.watch(root)
        started = anyio.current_time()

        def tree(otherwise: Status) -> Tree:
            now = anyio.current_time()
            ledger.check()
            branch = root.freeze(otherwise, now)
            error = branch.reason if branch.status in (Status.FAILED, Status.REFUSED) else ""
            return Tree(task.id, branch, price(branch, now - started), seed, error)

        try:
            with fresh_cache(), anyio.move_on_after(budget.seconds):
                await run_branch(setting, root, None if program is None else steer(program, setting, root, task))
        except anyio.get_cancelled_exc_class():
            if self.on_cancel is not None:
                self.on_cancel(tree(Status.CANCELLED))
            raise
        ended = tree(Status.TIMED_OUT)
        if self.on_end is not None:
            self.on_end(ended)
        return ended

    async def grow(self, job: Job, regrow: int = 0) -> Tree:
        """Grow the tree of a job. If the backend fails a branch (`Tree.failed`), grow it anew, up to `regrow` times with other seeds."""
        tree = await self.run(job.task, job.budget, job.seed)
        for attempt in range(1, regrow + 1):
            if not tree.failed:
                break
            tree = replace(await self.run(job.task, job.budget, seed_of(job.seed, "again", attempt)), regrown=attempt)
        return tree

    @asynccontextmanager
    async def run_many(
        self, jobs: Iterable[Job], in_flight: int = 64, regrow: int = 0
    ) -> AsyncIterator[MemoryObjectReceiveStream[tuple[Job, Tree]]]:
        """Stream `(job, tree)` pairs as trees finish; at most `in_flight` trees grow or wait to be taken. For `regrow`, see `grow`.

        Leaving the block cancels the trees that are still growing. Raises `ConfigError` if `in_flight` is below 1.
        """
        if in_flight < 1:
            raise ConfigError(f"in_flight is {in_flight}; give at least 1, or no tree is grown")
        waiting = iter(jobs)
        send, receive = anyio.create_memory_object_stream[tuple[Job, Tree]](0)

        async def worker(results: MemoryObjectSendStream[tuple[Job, Tree]]) -> None:
            async with results:
                for job in waiting:
                    tree = await self.grow(job, regrow)
                    try:
                        await results.send((job, tree))
                    except anyio.BrokenResourceError:
                        return  # the block was left, and this task is about to be cancelled

        async with task_group() as group:
            async with send:
                for _ in range(in_flight):
                    group.start_soon(worker, send.clone())
            async with receive:
                try:
                    yield receive
                finally:
                    # Before the stream closes, so that no worker finds it closed and raises an error, not even on an interrupt.
                    group.cancel_scope.cancel()


def _follow_up(setting: Setting, ledger: Ledger, task: Task, after: Tree, expects: AnswerType | None) -> list[int]:
    """The context of a finished tree, and a message after it."""
    message, *more = task.messages
    if more or message.role != "user" or message.media:
        raise TaskError(f"task {task.id} follows a tree: it has one message, the user's, without videos (documents may be videos)")
    last = next((turn for turn in reversed(after.root.turns) if turn.sampled or turn.appended), None)
    closed = last is not None and last.stop is StopReason.END and not last.appended
    return [*after.root.ids, *setting.chat.after_turn(setting.content(message.content, ledger, 0, expects), closed, role="user")]
