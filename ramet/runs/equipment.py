"""From the settings `tools`, `roles` and `program` to what they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ramet.agents.chat import ChatFormat
from ramet.agents.equipment import Equipment
from ramet.agents.growth import Role
from ramet.agents.program import Program
from ramet.agents.programs import PROGRAMS
from ramet.agents.tools import Tool, Tools, budget, read, tool
from ramet.attention.settings import AttentionConfig
from ramet.errors import ConfigError, RametError, require
from ramet.imports import load_object
from ramet.policy.models.catalogue import find
from ramet.runs.settings import NAMING, RoleConfig, RunConfig
from ramet.tools.calculator import calculator
from ramet.tools.search import search


def _python() -> Tool:
    require("pydantic_monty", "the tool python")
    from ramet.tools.python import python_tool

    return python_tool()


def _search() -> Tool:
    require("bm25s", "the tool search")
    return search


BUILT_IN: dict[str, Callable[[], Tool]] = {
    "read": lambda: read, "search": _search, "budget": lambda: budget, "calculator": lambda: calculator, "python": _python,
}  # fmt: skip
"""Tools that have a name of their own in settings."""
OpenEngine = Callable[[RunConfig, str], tuple[Any, ChatFormat, Any]]
"""See `ramet.runs.build.open_engine`."""


def equipment_of(config: RunConfig, open_engine: OpenEngine) -> Equipment:
    """What a run's trees have beside its policy; the models of roles are opened, each once, and not yet serving.

    Raises `ConfigError`, in one line that names the key, for what cannot be imported or is of the wrong kind.
    """
    equipment = named_equipment(config)
    roles, engines = dict(equipment.roles), dict[RoleConfig, tuple[Any, ChatFormat]]()
    for name, role in config.roles.items():
        model = RoleConfig(model=role.model, backend=role.backend, url=role.url, chat=role.chat)
        if role.own and model not in engines:
            engines[model] = _open(config, model, open_engine)
        if role.own:
            policy, chat = engines[model]
            roles[name] = replace(roles[name], policy=policy, chat=chat)
    return replace(equipment, roles=roles)


def named_equipment(config: RunConfig) -> Equipment:
    """The same without the models of roles, which are looked for and not opened: what is wrong is said before a run makes anything."""
    tools = load_tools(config.tools, "tools", config.tools_at)
    roles = {name: _role(name, role) for name, role in config.roles.items()}
    program = load_program(config.program) if config.program else None
    return Equipment(tools, config.tools_at, roles, program, sources=_sources(config.mcp))


def _sources(servers: Sequence[str]) -> list[Callable[[], AbstractAsyncContextManager[list[Tool]]]]:
    if not servers:
        return []
    require("mcp", "the setting mcp")
    from ramet.tools.mcp import mcp_tools

    return [partial(mcp_tools, server) for server in servers]


def load_tools(paths: Sequence[str], key: str, at: str = "everywhere") -> list[Tool]:
    """The tools of these names and import paths. A plain function becomes a tool with the defaults of `ramet.tool`."""
    tools = [_tool(path, key) for path in paths]
    try:
        Tools(tools, at)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return tools


def _tool(path: str, key: str) -> Tool:
    if path in BUILT_IN:
        return BUILT_IN[path]()
    if ":" not in path:
        raise ConfigError(f"{key}: {path!r} is neither of the form package.module:function nor one of {', '.join(BUILT_IN)}")
    value = load_object(path, key)
    if isinstance(value, Tool):
        return value
    if isinstance(value, type) or not callable(value):
        raise ConfigError(f"{key}: {path} is neither a tool nor a function")
    try:
        return tool(value)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def load_program(path: str, key: str = "program") -> Program:
    """The program of this name (`PROGRAMS`) or import path: an async function that takes the branch."""
    if path in PROGRAMS:
        return PROGRAMS[path]
    if ":" not in path:
        raise ConfigError(f"{key}: {path!r} is neither of the form package.module:function nor one of {', '.join(PROGRAMS)}")
    value: Any = load_object(path, key)
    call = value if inspect.isroutine(value) else getattr(value, "__call__", None)  # noqa: B004
    if isinstance(value, type) or not inspect.iscoroutinefunction(call):
        raise ConfigError(f"{key}: {path} is not an async function; a program is `async def name(branch)`")
    try:
        inspect.signature(value).bind(None)
    except TypeError:
        raise ConfigError(f"{key}: {path} cannot be called with the branch alone; a program is `async def name(branch)`") from None
    program: Program = value
    return program


def _role(name: str, role: RoleConfig) -> Role:
    if role.model and role.backend not in NAMING:
        try:
            find(role.model)
        except RametError as error:
            raise ConfigError(f"roles.{name}.model: {error}") from None
    tools = None if role.tools is None else load_tools(role.tools, f"roles.{name}.tools")
    trainable = not role.own if role.trainable is None else role.trainable
    return Role(system=role.system, tools=tools, description=role.description, trainable=trainable)


def _open(config: RunConfig, role: RoleConfig, open_engine: OpenEngine) -> tuple[Any, ChatFormat]:
    """The policy and the chat format of a role's own model. Headers, which may hold secrets, go to the host that they are for, no other."""
    here = urlsplit(role.url)[:2] == urlsplit(config.url)[:2]
    server = config.server.model_copy(update={"model": "", "headers": config.server.headers if here else {}})
    options = {"backend": role.backend, "url": role.url, "server": server, "attention": AttentionConfig(), "chat": role.chat}
    policy, chat, _ = open_engine(config.model_copy(update=options), role.model)
    return policy, chat
