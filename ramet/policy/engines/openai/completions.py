"""Token ids to `/completions`, and back."""

from __future__ import annotations

from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import StopReason
from ramet.errors import PolicyError, RefusedRequest
from ramet.policy.engines.openai.said import Said, logprob, stop_of
from ramet.policy.engines.openai.server import REJECTED, WIRE, Exchange, Server, note_prompt, parsed

ADVICE = "use the chat backend with it"


class CompletionsPolicy(Server):
    """For servers that take token ids and return those that they sampled (`return_token_ids`).

    Log-probabilities are the server's: start vLLM with `--logprobs-mode processed_logprobs` for those of the sampling
    distribution at temperatures other than 0 and 1.
    """

    trainable = True
    path = "completions"
    optional = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream_options", "stream")

    def _chosen(self) -> str:
        if len(self._listed) > 1:
            raise PolicyError(f"{self._url} lists {len(self._listed)} models; name the one whose tokens these are: {self._names()}")
        return self._listed[0]

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        asked = request.sampling
        return {
            "prompt": list(request.prompt), "max_tokens": request.max_tokens, "temperature": asked.temperature, "top_p": asked.top_p,
            "top_k": asked.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": request.seed % 2**63,
            "stop_token_ids": sorted(request.stop_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip

    async def _explained(self, error: PolicyError, exchange: Exchange) -> PolicyError:
        """Servers refuse token ids with all sorts of errors, also such as may pass: one request in words tells."""
        refused = exchange.status in REJECTED or bool(exchange.refused)
        if self._served or not refused or isinstance(error, RefusedRequest) or not await self._takes_words():
            return await super()._explained(error, exchange)
        return PolicyError(f"{error}; it takes words: if it is token ids that it refuses, {ADVICE}")

    async def _takes_words(self) -> bool:
        assert self._client is not None
        try:
            body = {"model": self.model, "prompt": "a", self._fields.names.get("max_tokens", "max_tokens"): 1}
            reply = await self._client.post(self._address.at(self.path), json=body, timeout=min(self._seconds, 30.0))
        except WIRE:
            return False
        said = parsed(reply.text)
        return reply.is_success and isinstance(said, dict) and bool(said.get("choices"))

    def hear(self, request: SampleRequest, partial: Partial) -> Ids:
        return Ids(request, partial)


class Ids:
    """Takes token ids as they come."""

    def __init__(self, request: SampleRequest, partial: Partial):
        self._request, self._partial, self._finish = request, partial, ""

    def take(self, said: Said) -> None:
        partial, request = self._partial, self._request
        self._finish = said.finish or self._finish
        if said.ids is None and said.text and not partial.ids:
            raise PolicyError(f"does not return the token ids that it sampled; {ADVICE}")
        ids = said.ids or []
        if request.sampling.temperature == 0:
            logprobs = [0.0] * len(ids)
        else:
            listed = said.tokens if said.ids is not None else []
            if len(listed) != len(ids):
                raise PolicyError(f"returns {len(listed)} log-probabilities for {len(ids)} tokens")
            logprobs = [_known(value) for _, value in listed]
        partial.ids += ids
        partial.logprobs += logprobs
        note_prompt(said.usage, len(request.prompt), partial)
        if len(partial.ids) > request.max_tokens:
            raise PolicyError(f"generated {len(partial.ids)} tokens for a grant of {request.max_tokens}: it does not keep to max_tokens")

    def settle(self) -> None:
        if self._finish and not self._partial.ids and stop_of(self._finish) is StopReason.END:
            raise PolicyError(f"ends a sample without a token id; {ADVICE}")


def _known(value: Any) -> float:
    """A log-probability that can be trained on. Raises `ValueError` for what is none."""
    known = logprob(value)
    if known is None:
        raise ValueError(f"a log-probability of {value!r}")
    return known
