"""Agent: a model and its clones, asked in one line.

    tree = ramet.Agent("nano").run_sync("3+4-2+7-9+5+8-1", budget=256)

What a question becomes for the model is decided here (`question_task`), for this class and for `ramet run`; the tree itself is
grown by `ramet.agents.runtime`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Literal, Self

import anyio

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat, ControlTokenFormat
from ramet.agents.context import ContextStore
from ramet.agents.events import Event
from ramet.agents.program import Program
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tools import Tool, read, tool
from ramet.agents.tree import Message, Segment, Task, Tree, index
from ramet.env.arithmetic import parse_sum, rows_task
from ramet.env.instructions import COT, DELEGATE_PARTS, DOCUMENTS, instructed
from ramet.errors import ConfigError, TaskError
from ramet.policy.models.catalogue import resolve
from ramet.runs.build import open_engine
from ramet.runs.settings import NAMING, RunConfig, validate

Documents = Mapping[str, str | Segment]


class Agent:
    """A model that may delegate to clones of itself, to be asked anything.

    model    "nano" (the default; it adds up sums and nothing else), a name of `ramet models list`, a model directory, or hf:owner/name;
             of a chat server, its name for the model, by default its first
    url      an OpenAI-compatible server that samples, such as http://127.0.0.1:8000/v1; nothing then needs torch
    backend  "chat" (the default with `url`), "responses", "completions", "transformers" (the default without) or "vllm"
    system   the root's instructions
    tools    what branches may call: `ramet.tool`s, or plain functions with annotations
    program  decides in the model's place what the root does; `run` may name another one
    options  of `Runtime` (`roles`, `tools_at`, `approve`, `middleware`, `on_cancel`, ...) and, for the engine, the settings `chat`,
             `device`, `dtype`, `threads` and `server`

    `async with Agent(...) as agent:` keeps the engine serving, for several questions, also at once. Without it, the engine starts and stops
    with each call. Raises `ConfigError` for options that cannot be meant.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        url: str = "",
        backend: Literal["transformers", "vllm", "completions", "chat", "responses"] | None = None,
        system: str = "",
        tools: Sequence[Tool | Callable[..., Any]] = (),
        program: Program | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ):
        backend = backend or ("chat" if url else "transformers")
        if model is None and backend not in NAMING:
            model = "nano"
        settings: dict[str, Any] = {name: options.pop(name) for name in ("chat", "device", "dtype", "threads", "server") if name in options}
        config = validate(RunConfig, {"model": model or "server", "backend": backend, "url": url, "env": {"kind": "rows"}, **settings})
        unknown = options.keys() - {field.name for field in fields(Runtime) if field.init and not field.name.startswith("_")}
        if unknown:
            raise ConfigError(f"Agent takes no {', '.join(sorted(unknown))}; see the options of Runtime")
        self._config, self._model = config, str(resolve(model)) if model and backend not in NAMING else model or ""
        self._system, self._program = system, program
        self._options = {"tools": [each if isinstance(each, Tool) else tool(each) for each in tools], **options}
        self._sampling = sampling or Sampling(temperature=0.0)
        self._engine: Any = None
        self._runtime: Runtime | None = None
        self._serving = self._alone = False

    async def run(
        self,
        question: str | Task | Sequence[Message],
        documents: Documents | None = None,
        budget: int | Budget = 1024,
        *,
        seed: int = 0,
        answer: Any = None,
        program: Program | None = None,
        after: Tree | None = None,
    ) -> Tree:
        """Grow the tree of one question: `tree.answer`, `tree.usage`, `tree.value`.

        documents  what the tree may read, by key; the root is told the keys, and reads by `ramet.read` or sends clones
        budget     of the whole tree; a number is generated tokens, with one level of clones
        answer     the type that the answer has to fit (`Task.answer`)
        after      a finished tree that the question goes on with
        """
        async with self._served() as runtime:
            task, limits, runtime = self._prepared(runtime, question, documents, budget, answer, after)
            return await runtime.run(task, limits, seed, program=program or self._program, after=after)

    async def stream(
        self,
        question: str | Task | Sequence[Message],
        documents: Documents | None = None,
        budget: int | Budget = 1024,
        *,
        seed: int = 0,
        answer: Any = None,
        program: Program | None = None,
        after: Tree | None = None,
    ) -> AsyncGenerator[Event, None]:
        """What happens in the tree, as it happens (`ramet.agents.events`); the last event has the tree."""
        async with self._served() as runtime:
            task, limits, runtime = self._prepared(runtime, question, documents, budget, answer, after)
            async with aclosing(runtime.stream(task, limits, seed, program=program or self._program, after=after)) as events:
                async for event in events:
                    yield event

    def run_sync(self, question: str | Task | Sequence[Message], documents: Documents | None = None, **options: Any) -> Tree:
        """`run`, for scripts. Raises `ConfigError` where an event loop is running, as in a notebook: `await agent.run(...)` there."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return anyio.run(lambda: self.run(question, documents, **options))
        raise ConfigError("an event loop is running here already, as in a notebook: write `await agent.run(...)` instead of run_sync")

    def _prepared(
        self,
        runtime: Runtime,
        question: str | Task | Sequence[Message],
        documents: Documents | None,
        budget: int | Budget,
        answer: Any,
        after: Tree | None,
    ) -> tuple[Task, Budget, Runtime]:
        limits = budget if isinstance(budget, Budget) else token_budget(budget)
        if isinstance(question, Task):
            task = question
            if documents is not None or answer is not None:
                raise ConfigError("a Task has its own documents and answer: give them there")
        elif after is None:
            task = question_task(question, runtime.chat, documents or {}, limits, self._system)
        else:
            messages = (Message("user", question),) if isinstance(question, str) else tuple(question)
            task = Task("question", messages, documents or {})
        if not isinstance(question, Task):
            task = replace(task, answer=answer)
        return task, limits, with_read(runtime, task)

    @asynccontextmanager
    async def _served(self) -> AsyncIterator[Runtime]:
        """The runtime, its engine serving."""
        if self._serving:
            yield self._open()
            return
        if self._alone:
            raise ConfigError("this agent is answering already: for several questions at once, write `async with Agent(...) as agent:`")
        self._alone = True
        try:
            runtime = self._open()
            async with self._engine:
                yield runtime
        finally:
            self._alone = False

    def _open(self) -> Runtime:
        """The runtime on the model, which is loaded once."""
        if self._runtime is None:
            self._engine, chat, _ = open_engine(self._config, self._model)
            self._runtime = Runtime(self._engine, chat, self._sampling, **self._options)
        return self._runtime

    async def __aenter__(self) -> Self:
        self._open()
        await self._engine.__aenter__()
        self._serving = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._serving = False
        await self._engine.__aexit__(kind, error, trace)


def token_budget(generated: int, depth: int = 1) -> Budget:
    """A budget of so many generated tokens, an eighth of them, and at most 24, kept for the answer. Raises `ConfigError` below 1."""
    if generated < 1:
        raise ConfigError("a budget of zero tokens answers nothing; give at least 1")
    return Budget(generated=generated, depth=depth, answer_reserve=min(24, generated // 8))


def question_task(question: str | Sequence[Message], chat: ChatFormat, documents: Documents, budget: Budget, system: str = "") -> Task:
    """The task of a question, or of a conversation that ends with one, as the model is used to being asked.

    To a model of the nano format a sum is put in rows, as in its training, and documents stand in front of the question; it knows
    nothing else. Others are told in words which documents there are, how to delegate and how to answer.
    """
    messages = [Message("user", question)] if isinstance(question, str) else [*question]
    if not messages or not messages[-1].content.strip():
        raise TaskError("the question is empty")
    final = messages.pop()
    if isinstance(chat, ControlTokenFormat):
        if not documents:
            return rows_task(parse_sum(final.content), "question")
        return Task("question", (Message("user", f"{ContextStore(documents).render(documents)}\n{final.content}"),), documents)
    spawns = budget.depth != 0 and budget.clones != 0 and budget.width != 0
    content = f"{final.content}\n\n{index(documents)}" if documents else final.content
    whole = (*([Message("system", system)] if system else []), *messages, replace(final, content=content))
    return instructed(Task("question", whole, documents), (DOCUMENTS if documents else DELEGATE_PARTS) if spawns else COT)


def with_read(runtime: Runtime, task: Task) -> Runtime:
    """The runtime with `ramet.read` among its tools, if the task has documents and the model is one that knows of tools."""
    if not task.documents or isinstance(runtime.chat, ControlTokenFormat) or any(each.name == read.name for each in runtime.tools):
        return runtime
    return replace(runtime, tools=[*runtime.tools, read])
