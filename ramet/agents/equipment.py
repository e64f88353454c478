"""What a run's trees have beside their policy: tools, roles, and a program in the place of the root's decisions.

A run hands one `Equipment` from its settings to wherever its trees grow, which is inside of `serving`; `journaled` where an
interrupted run must find again what was sampled and called.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ramet.agents.chat import ChatFormat
from ramet.agents.growth import Role, chats_of
from ramet.agents.journal import Journal
from ramet.agents.prefixes import FreshCache
from ramet.agents.program import Program
from ramet.agents.resume import JournaledPolicy, JournaledTools
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Policy, Sampling
from ramet.agents.tools import Tool, ToolCaller, Tools, call_tool


@dataclass(frozen=True, slots=True)
class Equipment:
    """The options of `Runtime` that are a run's own; see there.

    sources  of more tools, which are there while the equipment serves: `ramet.tools.mcp.mcp_tools` of a server
    """

    tools: Sequence[Tool] = ()
    tools_at: Literal["everywhere", "clones", "root"] = "everywhere"
    roles: Mapping[str, Role] = field(default_factory=dict)
    program: Program | None = None
    caller: ToolCaller = call_tool
    sources: Sequence[Callable[[], AbstractAsyncContextManager[Sequence[Tool]]]] = ()

    def runtime(self, policy: Policy, chat: ChatFormat, sampling: Sampling | None = None, **options: Any) -> Runtime:
        """A runtime with this equipment, which counts prompt tokens as if every tree began with an empty cache (`FreshCache`).

        `options` are others of its options.
        """
        return Runtime(
            FreshCache(policy), chat, sampling or Sampling(), tools=self.tools, tools_at=self.tools_at, roles=self._roles(FreshCache),
            program=self.program, caller=self.caller, **options,
        )  # fmt: skip

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Equipment]:
        """A block in which the policies of the roles and the sources of tools serve; gives the equipment to grow trees with there.

        Raises `ConfigError` for a source that gives no tools, or one that is called like another.
        """
        async with AsyncExitStack() as stack:
            policies: dict[int, Any] = {id(role.policy): role.policy for role in self.roles.values()}
            for policy in policies.values():
                if hasattr(policy, "__aenter__"):
                    await stack.enter_async_context(policy)
            tools = [*self.tools]
            for source in self.sources:
                tools += await stack.enter_async_context(source())
            Tools(tools, self.tools_at)
            yield replace(self, tools=tools, sources=())

    def journaled(self, journal: Journal) -> Equipment:
        """With everything that tools return and the policies of roles sample kept in `journal`, and taken from there."""
        roles = self._roles(lambda policy: JournaledPolicy(policy, journal))
        return replace(self, roles=roles, caller=JournaledTools(journal))

    def chats(self) -> dict[str, ChatFormat]:
        """The formats of the roles that have another one than the model."""
        return chats_of(self.roles)

    def _roles(self, wrapped: Callable[[Policy], Policy]) -> dict[str, Role]:
        """The roles, with the policies wrapped that they have of their own: once each, also where roles share one."""
        own = {id(role.policy): wrapped(role.policy) for role in self.roles.values() if role.policy is not None}
        return {name: role if role.policy is None else replace(role, policy=own[id(role.policy)]) for name, role in self.roles.items()}
