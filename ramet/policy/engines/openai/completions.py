"""The policy of a completions server: token ids to `/completions`, and back."""

from __future__ import annotations

from typing import Any

from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import OVERRUN, StopReason
from ramet.errors import PolicyError, RefusedRequest
from ramet.policy.engines.openai.chunk import Chunk, logprob, stop_of
from ramet.policy.engines.openai.server import REJECTED, WIRE, Exchange, Server, note_prompt, parsed

ADVICE = "use the chat backend with it"
"""What to do about a server that does not exchange token ids."""


class CompletionsPolicy(Server):
    """Samples from servers that accept token ids and return those that they sampled (`return_token_ids`).

    Log-probabilities are the server's. Start vLLM with `--logprobs-mode processed_logprobs`, so that at temperatures other than
    0 and 1 they are those of the sampling distribution.
    """

    trainable = True
    path = "completions"
    optional = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stream_options", "stream")

    def _chosen(self) -> str:
        if len(self._listed) > 1:
            raise PolicyError(f"{self._url} lists {len(self._listed)} models; name the one whose tokens these are: {self._names()}")
        return self._listed[0]

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        return {
            "prompt": list(request.prompt), "max_tokens": request.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": request.seed % 2**63,
            "stop_token_ids": sorted(request.stop_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip

    async def _explained(self, error: PolicyError, exchange: Exchange) -> PolicyError:
        """Whether token ids were refused, which servers do with any error, also transient ones: a request with text shows."""
        refused = exchange.status in REJECTED or bool(exchange.refused)
        if self._served or not refused or isinstance(error, RefusedRequest) or not await self._accepts_text():
            return await super()._explained(error, exchange)
        return PolicyError(f"{error}; it accepts text: if it refuses token ids, {ADVICE}")

    async def _accepts_text(self) -> bool:
        """Whether the server completes a prompt that is given as text."""
        body = {"model": self.model, "prompt": "a", self._fields.names.get("max_tokens", "max_tokens"): 1}
        try:
            reply = await self._whole("POST", self.path, min(self._seconds, 30.0), body)
        except WIRE:
            return False
        if reply is None:
            return False
        reply_json = parsed(reply.text)
        return reply.is_success and isinstance(reply_json, dict) and bool(reply_json.get("choices"))

    def accumulator(self, request: SampleRequest, partial: Partial) -> TokenIdAccumulator:
        """An accumulator of token ids."""
        return TokenIdAccumulator(request, partial)


class TokenIdAccumulator:
    """Adds the token ids of chunks to a partial sample."""

    def __init__(self, request: SampleRequest, partial: Partial):
        self._request, self._partial, self._finish = request, partial, ""

    def take(self, chunk: Chunk) -> None:
        """Add a chunk. Raises `PolicyError` for one without ids or with more tokens than the grant, `ValueError` for a log-probability
        that is not a finite number.
        """
        partial, request = self._partial, self._request
        self._finish = chunk.finish or self._finish
        if chunk.ids is None and chunk.text and not partial.ids:
            raise PolicyError(f"does not return the token ids that it sampled; {ADVICE}")
        ids = chunk.ids or []
        if request.sampling.temperature == 0:
            logprobs = [0.0] * len(ids)
        else:
            listed = chunk.tokens if chunk.ids is not None else []
            if len(listed) != len(ids):
                raise PolicyError(f"returns {len(listed)} log-probabilities for {len(ids)} tokens")
            logprobs = [_required_logprob(value) for _, value in listed]
        partial.ids += ids
        partial.logprobs += logprobs
        note_prompt(chunk.usage, len(request.prompt), partial)
        if len(partial.ids) > request.max_tokens:
            raise PolicyError(f"generated {len(partial.ids)} tokens for a grant of {request.max_tokens}: it {OVERRUN}")

    def settle(self) -> None:
        """Note that no chunk follows. Raises `PolicyError` for a sample that ended by itself without a token id."""
        if self._finish and not self._partial.ids and stop_of(self._finish) is StopReason.END:
            raise PolicyError(f"ends a sample without a token id; {ADVICE}")


def _required_logprob(value: Any) -> float:
    """The value as a log-probability. Raises `ValueError` unless it is a finite number."""
    finite = logprob(value)
    if finite is None:
        raise ValueError(f"a log-probability of {value!r}")
    return finite
