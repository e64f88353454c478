"""What was sampled once is not sampled again: a journal of samples behind the policy, and of tools' results behind the tools.

A tree is a function of its task, its budget, its seed and what its samples return. An interrupted tree is therefore grown again from
the beginning, and every sample that had finished comes from the journal instead of the engine: finished clones, finished turns of
unfinished branches, and failed attempts with their cost. Only what is missing reaches the engine, with the same seeds. As the journal
is written sample by sample, a long tree loses no more than a short one. What an unfinished sample had generated when the run was
stopped is charged to the tree that requests it again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import anyio

from ramet.agents.journal import Journal
from ramet.agents.sampling import Partial, Policy, PolicyWrapper, Sample, SampleRequest
from ramet.agents.tools import BranchView, Tool, ToolCaller, ToolRequest, call_tool
from ramet.agents.tree import StopReason, ToolResult, ToolStatus
from ramet.errors import Interrupted, PolicyError, TransientPolicyError, from_record, to_record

GAVE_UP, TOOL = "gave_up", "tool"
"""Keys of the record that says that a run ended because of errors, and of those of tools' calls."""


class JournaledPolicy(PolicyWrapper):
    """A policy that writes every finished attempt to `journal`, and replays the attempts that are in it already.

    A request is identified by (group, seed), which must be unique in the journal, and a record is replayed only if its prompt, grant
    and sampling match; records that do not match are passed over. A cancelled sample is recorded if it has cost anything, and is
    sampled again.
    """

    def __init__(self, policy: Policy, journal: Journal):
        super().__init__(policy)
        self._journal = journal
        self._known: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for record in journal:
            if GAVE_UP in record:
                self._forget_errors()
            elif TOOL not in record:
                self._known.setdefault((record["group"], record["seed"]), []).append(record)
        self.replayed = self.sampled = 0
        """Numbers of attempts taken from the journal, and of attempts made."""

    def give_up(self) -> None:
        """Record that the run ends because of errors, so that the next one tries again instead of replaying them."""
        self._journal.append({GAVE_UP: True}, keep=False)

    def _forget_errors(self) -> None:
        """Drop the failed attempts that were not followed by a sample."""
        for key, records in self._known.items():
            sampled = max((i for i, record in enumerate(records) if "error" not in record), default=-1)
            self._known[key] = [r for i, r in enumerate(records) if i < sampled or r.get("kind") in (None, Interrupted.kind)]

    def _recorded(self, request: SampleRequest, checksum: int) -> dict[str, Any] | None:
        """The first record of this request that has not been replayed; an interruption matches whatever its checksum."""
        records = self._known.get((request.group, request.seed), [])
        at = next((i for i, r in enumerate(records) if r["asked"] == checksum or r.get("kind") == Interrupted.kind), None)
        return None if at is None else records.pop(at)

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Replay the request's next recorded attempt, its error included, or sample and record it."""
        media = (request.media,) if request.media else ()
        checksum = zlib.crc32(repr((request.prompt, request.max_tokens, request.sampling, *media)).encode())
        if (recorded := self._recorded(request, checksum)) is not None:
            await anyio.lowlevel.checkpoint()
            self.replayed += 1
            return _replay(recorded, partial)
        self.sampled += 1
        record = {"group": request.group, "seed": request.seed, "asked": checksum}
        try:
            sample = await self._policy.sample(request, partial)
        except anyio.get_cancelled_exc_class():
            if partial.ids or partial.prefilled:
                self._journal.append({**record, **to_record(Interrupted("interrupted")), **_spent(partial)}, keep=False)
            raise
        except PolicyError as error:
            self._journal.append({**record, **to_record(error), **_spent(partial)}, keep=False)
            raise
        self._journal.append(
            {
                **record,
                "ids": sample.ids,
                "logprobs": sample.logprobs,
                "stop": sample.stop.value,
                "prefilled": sample.prefilled,
                "cached": sample.cached,
                "version": sample.version,
                **({"updates": sample.updates} if sample.updates else {}),
            },
            keep=False,
        )
        return sample


class JournaledTools:
    """The calls of tools, each written to `journal` when it has ended, and those in it given back, seconds and all.

    Calls are told apart by their place in the tree and by what they ask. One that was cut short is made again: a tool that must
    not run twice has to see to that itself.
    """

    def __init__(self, journal: Journal, caller: ToolCaller = call_tool):
        self._journal, self._caller = journal, caller
        self._known = {_place(record): record for record in journal if TOOL in record}
        self.replayed = self.called = 0
        """Calls taken from the journal, and calls made."""

    async def __call__(self, tool: Tool, request: ToolRequest, view: BranchView, timeout: float) -> tuple[ToolResult, float]:
        """The result that the journal has, or a new one."""
        call = {TOOL: True, **asdict(request)}
        if (kept := self._known.pop(_place(call), None)) is not None:
            await anyio.lowlevel.checkpoint()
            self.replayed += 1
            return ToolResult(ToolStatus(kept["status"]), kept["text"]), kept["seconds"]
        self.called += 1
        result, seconds = await self._caller(tool, request, view, timeout)
        self._journal.append({**call, "status": result.status.value, "text": result.text, "seconds": seconds}, keep=False)
        return result, seconds


def _place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("group", "branch", "turn", "number", "name", "arguments"))


def _spent(partial: Partial) -> dict[str, Any]:
    """The part of a record that holds what an attempt without a sample has cost."""
    return {"ids": list(partial.ids), "logprobs": list(partial.logprobs), "prefilled": partial.prefilled, "cached": partial.cached}


def _replay(record: dict[str, Any], partial: Partial) -> Sample:
    """Repeat one recorded attempt: fill `partial`, then return its sample or raise its error."""
    partial.ids += record["ids"]
    partial.logprobs += record["logprobs"]
    partial.prefilled, partial.cached = record["prefilled"], record["cached"]
    if "error" in record:
        error = from_record(record)
        if isinstance(error, TransientPolicyError):
            error.past = True
        raise error
    return Sample(
        tuple(partial.ids), tuple(partial.logprobs), StopReason(record["stop"]), partial.prefilled, partial.cached, record["version"],
        tuple(record.get("updates", ())),
    )  # fmt: skip
