"""What was sampled once is not sampled again: a journal of samples behind the policy.

A tree is a function of its task, its budget, its seed and what its samples return. So a tree that was
interrupted is grown again from its beginning, and every sample that had finished is taken from the journal
instead of the engine: finished clones, finished turns of unfinished branches, and failed attempts with
what they cost. Only what is missing reaches the engine, under the same seeds. What a tree has done is
kept sample by sample, so a long tree is no likelier to be lost than a short one. What a sample had generated
when the run was stopped is charged to the tree that asks for it again.
"""

from __future__ import annotations

import zlib
from typing import Any

import anyio

from ramet.agents.journal import Journal
from ramet.agents.sampling import Partial, Policy, PolicyWrapper, Sample, SampleRequest
from ramet.agents.tree import StopReason
from ramet.errors import Interrupted, PolicyError, RefusedRequest, TransientPolicyError

GAVE_UP = "gave_up"
KINDS: dict[str, type[PolicyError]] = {
    "interrupted": Interrupted, "transient": TransientPolicyError, "refused": RefusedRequest, "lasting": PolicyError,
}  # fmt: skip
"""What ended an attempt that gave no sample, the narrowest first."""


class JournaledPolicy(PolicyWrapper):
    """`policy`, with every attempt that ended written to `journal` and those in it given back.

    Requests are told apart by (group, seed), which must be unique in the job, and compared by what they
    ask for: a record of another prompt or grant is not used, and hides none that is. A sample that is cancelled
    is recorded if it has cost anything, and is sampled again.
    """

    def __init__(self, policy: Policy, journal: Journal):
        super().__init__(policy)
        self._journal = journal
        self._known: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for record in journal:
            if GAVE_UP in record:
                self._forget_errors()
            else:
                self._known.setdefault((record["group"], record["seed"]), []).append(record)
        self.replayed = self.sampled = 0
        """Attempts taken from the journal, and attempts made."""

    def give_up(self) -> None:
        """Note that the run ends because of errors: the next one asks again, instead of being given them."""
        self._journal.append({GAVE_UP: True}, keep=False)

    def _forget_errors(self) -> None:
        """Drop the failed attempts that no sample came after."""
        for key, records in self._known.items():
            sampled = max((i for i, record in enumerate(records) if "error" not in record), default=-1)
            self._known[key] = [r for i, r in enumerate(records) if i < sampled or r.get("kind") in (None, "interrupted")]

    def _recorded(self, request: SampleRequest, asked: int) -> dict[str, Any] | None:
        """The first record of this request that has not been given back; of its interruptions, whatever was asked then."""
        known = self._known.get((request.group, request.seed), [])
        at = next((i for i, r in enumerate(known) if r["asked"] == asked or r.get("kind") == "interrupted"), None)
        return None if at is None else known.pop(at)

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        media = (request.media,) if request.media else ()
        asked = zlib.crc32(repr((request.prompt, request.max_tokens, request.sampling, *media)).encode())
        if (found := self._recorded(request, asked)) is not None:
            await anyio.lowlevel.checkpoint()
            self.replayed += 1
            return _replay(found, partial)
        self.sampled += 1
        record = {"group": request.group, "seed": request.seed, "asked": asked}
        try:
            sample = await self._policy.sample(request, partial)
        except anyio.get_cancelled_exc_class():
            if partial.ids or partial.prefilled:
                self._journal.append({**record, "error": "interrupted", "kind": "interrupted", **_spent(partial)}, keep=False)
            raise
        except PolicyError as error:
            kind = next(name for name, of in KINDS.items() if isinstance(error, of))
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
        kind = KINDS[record["kind"]]
        raise kind(record["error"], past=True) if issubclass(kind, TransientPolicyError) else kind(record["error"])
    return Sample(
        tuple(partial.ids), tuple(partial.logprobs), StopReason(record["stop"]), partial.prefilled, partial.cached, record["version"],
        tuple(record.get("updates", ())),
    )  # fmt: skip
