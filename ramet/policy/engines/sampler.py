"""The state of requests in a batch, and the sampling of their tokens; shared by the backends that run a model themselves.

Token t of a request is sampled by inverting the cumulative distribution at the t-th number of the request's own
Philox stream, so a seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import numpy as np
import torch

from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import StopReason
from ramet.errors import PolicyError


@dataclass(slots=True, eq=False)
class RequestState:
    """A request that waits or is being sampled: a row of the batch.

    done     set when the engine has released the request
    stop     why it ended, once it has
    error    why it failed, if it has
    last     the newest token
    version  the weight version that samples it
    sight    what a backend with vision has computed of the request's media
    draws    the request's random numbers, uniform in [0, 1)
    """

    request: SampleRequest
    partial: Partial
    done: anyio.Event = field(default_factory=anyio.Event)
    stop: StopReason | None = None
    error: PolicyError | None = None
    last: int = 0
    version: int = 0
    sight: Any = None
    draws: Iterator[float] = field(init=False)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest."""
        return len(self.request.prompt) + len(self.partial.ids) - 1

    def __post_init__(self) -> None:
        self.draws = _draws(self.request.seed)

    async def sampled(self) -> Sample:
        """Wait for the end of the request. Raises its error if it failed; if the wait is cancelled, sampling stops."""
        try:
            await self.done.wait()
        except BaseException:
            self.stop = StopReason.CANCELLED
            raise
        if self.error is not None:
            raise self.error
        assert self.stop is not None
        partial = self.partial
        return Sample(tuple(partial.ids), tuple(partial.logprobs), self.stop, partial.prefilled, partial.cached, self.version)

    def fail(self, error: PolicyError) -> None:
        """End the request with an error."""
        self.error = error
        self.done.set()

    def emit(self, token: int, logprob: float) -> None:
        """Append a token, and set `stop` if it is the last; the engine sets `done` when it has released the row."""
        self.last = token
        self.partial.ids.append(token)
        self.partial.logprobs.append(logprob)
        if token in self.request.stop_ids:
            self.stop = StopReason.END
        elif len(self.partial.ids) >= self.request.max_tokens:
            self.stop = StopReason.LENGTH


def _draws(seed: int) -> Iterator[float]:
    """The uniform random numbers of a seed."""
    stream = np.random.Generator(np.random.Philox(key=seed))
    while True:
        yield from stream.random(64).tolist()


def sample_tokens(logits: torch.Tensor, rows: Sequence[RequestState]) -> tuple[list[int], list[float]]:
    """One token per row of `logits` (rows, vocabulary), and its log-probability under the row's sampling distribution.

    With temperature 0 the distribution is a point mass, and the log-probability 0. Raises `PolicyError` if a logit is not finite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise PolicyError("the model returned logits that are not finite; its weights are broken or it overflowed")
    settings = [row.request.sampling for row in rows]
    greedy = [s.temperature == 0 for s in settings]
    if all(greedy):
        return logits.argmax(-1).tolist(), [0.0] * len(rows)
    temperature = torch.tensor([s.temperature or 1.0 for s in settings], device=logits.device)[:, None]
    logprobs = truncate(torch.log_softmax(logits.float() / temperature, dim=-1), settings)
    cumulative = logprobs.double().exp().cumsum(-1)
    uniform = torch.tensor([next(row.draws) for row in rows], dtype=torch.float64, device=logits.device)[:, None]
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    chosen = logprobs.gather(-1, tokens).squeeze(-1).tolist()
    sampled = tokens.squeeze(-1).tolist()
    if any(greedy):
        best = logits.argmax(-1).tolist()
        sampled = [b if g else s for b, s, g in zip(best, sampled, greedy, strict=True)]
        chosen = [0.0 if g else c for c, g in zip(chosen, greedy, strict=True)]
    return sampled, chosen


def truncate(logprobs: torch.Tensor, settings: list[Any]) -> torch.Tensor:
    """Top-k and top-p truncation of `logprobs` (rows, vocabulary): excluded tokens get -inf, the others are normalised again."""
    if all(s.top_k == 0 and s.top_p == 1.0 for s in settings):
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True)
    rank = torch.arange(logprobs.shape[-1], device=logprobs.device)
    top_k = torch.tensor([s.top_k or logprobs.shape[-1] for s in settings], device=logprobs.device)[:, None]
    top_p = torch.tensor([s.top_p for s in settings], device=logprobs.device)[:, None]
    before = ordered.exp().cumsum(-1) - ordered.exp()
    cut = (rank >= top_k) | ((before >= top_p) & (top_p < 1.0))
    cut[:, 0] = False
    kept = torch.empty_like(logprobs).scatter_(-1, order, ordered.masked_fill(cut, -torch.inf))
    return torch.log_softmax(kept, dim=-1)
