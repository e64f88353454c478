"""What was sampled once is not sampled again: a journal of samples behind the policy.

A tree is a function of its task, its budget, its seed and what its samples return. So a tree that was
interrupted is grown again from its beginning, and every sample that had finished is taken from the journal
instead of the engine: finished clones, finished turns of unfinished branches, and failed attempts with
what they cost. Only what is missing reaches the engine, under the same seeds. What a tree has done is
kept sample by sample, so a long tree is no likelier to be lost than a short one.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

import anyio

from ramet.agents.journal import Journal
from ramet.agents.sampling import Partial, Policy, PolicyWrapper, Sample, SampleRequest
from ramet.agents.tree import StopReason
from ramet.errors import PolicyError, TransientPolicyError

GAVE_UP = "gave_up"


class JournaledPolicy(PolicyWrapper):
    """`policy`, with every attempt that ended written to `journal` and those in it given back.

    Requests are told apart by (group, seed), which must be unique in the job, and compared by what they
    ask for: a record of another prompt or grant is not used. Cancelled samples are not recorded.
    """

    def __init__(self, policy: Policy, journal: Journal):
        super().__init__(policy)
        self._journal = journal
        self._known: dict[tuple[str, int], deque[dict[str, Any]]] = {}
        for record in journal:
            if GAVE_UP in record:
                self._forget_errors()
            else:
                self._known.setdefault((record["group"], record["seed"]), deque()).append(record)
        self.replayed = self.sampled = 0
        """Attempts taken from the journal, and attempts made."""

    def give_up(self) -> None:
        """Note that the run ends because of errors: the next one asks again, instead of being given them."""
        self._journal.append({GAVE_UP: True}, keep=False)

    def _forget_errors(self) -> None:
        """Drop the attempts that no sample came after."""
        for key, records in list(self._known.items()):
            while records and "error" in records[-1]:
                records.pop()
            if not records:
                del self._known[key]

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        media = (request.media,) if request.media else ()
        asked = zlib.crc32(repr((request.prompt, request.max_tokens, request.sampling, *media)).encode())
        key = (request.group, request.seed)
        if known := self._known.get(key):
            record = known.popleft()
            if not known or record["asked"] != asked:
                del self._known[key]
            if record["asked"] == asked:
                await anyio.lowlevel.checkpoint()
                self.replayed += 1
                return _replay(record, partial)
        self.sampled += 1
        record = {"group": request.group, "seed": request.seed, "asked": asked}
        try:
            sample = await self._policy.sample(request, partial)
        except PolicyError as error:
            kind = "transient" if isinstance(error, TransientPolicyError) else "lasting"
            self._journal.append({**record, "error": str(error), "kind": kind, **_spent(partial)}, keep=False)
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


def _spent(partial: Partial) -> dict[str, Any]:
    return {"ids": list(partial.ids), "logprobs": list(partial.logprobs), "prefilled": partial.prefilled, "cached": partial.cached}


def _replay(record: dict[str, Any], partial: Partial) -> Sample:
    """Give back one attempt: its sample, or what it cost and its error."""
    partial.ids += record["ids"]
    partial.logprobs += record["logprobs"]
    partial.prefilled, partial.cached = record["prefilled"], record["cached"]
    if "error" in record:
        # It has been waited for once already.
        raise TransientPolicyError(record["error"], 0.0) if record["kind"] == "transient" else PolicyError(record["error"])
    return Sample(
        tuple(partial.ids), tuple(partial.logprobs), StopReason(record["stop"]), partial.prefilled, partial.cached, record["version"],
        tuple(record.get("updates", ())),
    )  # fmt: skip
