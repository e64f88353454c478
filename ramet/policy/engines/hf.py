"""The transformers backend: continuous batching of all requests of all trees, on CPU or CUDA.

    async with HFPolicy(model) as policy:
        sample = await policy.sample(request, Partial())

New requests join the running batch and finished ones leave it at any step. The part of a prompt that a stored prefix
covers is not computed again. The engine runs on the event loop's own thread, one
forward pass between two turns of the loop, so a run on the asyncio backend is deterministic.

A request's seed fixes its random numbers (see `sampler`). The rest of a batch changes nothing but rounding: a matrix product over
another number of rows, or a prefix computed in another batch, can differ in the last bits of float32 (about 1e-6 in a
log-probability), so a token differs only if its random number is that close to a boundary. In
bfloat16 the differences are about 1e-2, and tokens do change with the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ramet.agents.sampling import Partial, SampleRequest
from ramet.agents.tree import Segment
from ramet.errors import PolicyError, first_line
from ramet.policy.engines.kv import Memory, PrefixStore, SlotCache, common_prefix
from ramet.policy.engines.sampler import RequestState, sample_tokens
from ramet.policy.engines.serving import Serving
from ramet.policy.models.load import Inputs, steady_context

PREFILL_TOKENS = 2048
"""The most prompt tokens of one forward pass, padding included."""
MIN_SHARED_PREFIX = 32
"""A request waits one step for one of the same batch that shares at least this many more prompt tokens with it than are stored."""
PATIENCE = 6
"""The most decode steps that new requests wait, so that their prompts are computed together."""
ADVICE = "choose another backend"
"""What to do about a model that this backend cannot serve."""


@dataclass(slots=True)
class Stats:
    """What the engine has done since it was created.

    steps            forward passes
    generated        tokens sampled
    prefilled        prompt tokens computed
    cached           prompt tokens taken from stored prefixes
    forward_seconds  inside the model
    busy_seconds     inside the engine's steps, the model included
    """

    steps: int = 0
    generated: int = 0
    prefilled: int = 0
    cached: int = 0
    forward_seconds: float = 0.0
    busy_seconds: float = 0.0


class HFPolicy(Serving):
    """Samples from one causal language model. Enter it to serve.

    model           any transformers causal LM with full or latent attention, loaded with `attn_implementation="sdpa"` or "eager"
    max_batch       the most requests that decode together
    context         longest prompt and sample together, in tokens; by default, and at most, the `steady_context` of the model
    prefix_bytes    memory for the keys and values of contexts, kept for later turns and siblings

    Raises `PolicyError` for a model that it cannot serve exactly: logits of a few tokens are compared with the model's own.
    """

    def __init__(self, model: Any, *, max_batch: int = 64, context: int | None = None, prefix_bytes: int = 2**28):
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds and getattr(config, "sliding_window", None) is not None:
            kinds = {"sliding_attention"}
        if kinds - {"full_attention"}:
            raise PolicyError(
                f"{type(model).__name__} has {', '.join(sorted(kinds))} layers; the transformers backend serves full attention only"
            )
        if _has_alibi(config):
            raise PolicyError(f"{type(model).__name__} uses ALiBi, which the transformers backend does not support; {ADVICE}")
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise PolicyError(f"attention {model.config._attn_implementation!r} does not support the batch mask; load the model with sdpa")
        longest = steady_context(model.config)
        if max_batch < 1 or prefix_bytes < 0 or not 2 <= (context or longest) <= longest:
            settings = f"max_batch {max_batch}, context {context}, prefix_bytes {prefix_bytes}"
            raise PolicyError(f"{settings}: max_batch must be 1 or more, context 2 to {longest}, prefix_bytes 0 or more")
        super().__init__(context or longest)
        self.model = model
        self.max_batch = max_batch
        self.stats = Stats()
        self._layers = config.num_hidden_layers
        self._store = PrefixStore(prefix_bytes)
        self._cache = SlotCache(self._layers)
        self._active: list[RequestState] = []
        self._patience = 0
        if not self.vision:
            self._check()

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare two prompts of different length, prefilled and decoded in slots, with the model's own logits. Raises `PolicyError`."""
        training, name = self.model.training, type(self.model).__name__
        vocabulary = self.model.get_input_embeddings().num_embeddings
        prompts = [tuple((7 * i + n) % vocabulary for i in range(3 + 2 * n)) for n in (0, 1)]
        rows = [RequestState(SampleRequest(prompt, 1, frozenset()), Partial()) for prompt in prompts]
        texts = [torch.tensor(prompt) for prompt in prompts]
        prefilled = [len(text) - 1 for text in texts]
        self.model.eval()
        try:
            padded = torch.nn.utils.rnn.pad_sequence([text[:-1] for text in texts], batch_first=True)
            self._forward(rows, 0, padded, torch.arange(max(prefilled)).expand(2, -1))
            served = self._forward(rows, 0, torch.stack([text[-1:] for text in texts]), torch.tensor(prefilled)[:, None])[:, -1].float()
            alone = torch.stack([self.model(input_ids=text[None].to(self.device), use_cache=False).logits[0, -1] for text in texts]).float()
        except Exception as error:  # a model that accepts other arguments may raise anything
            raise PolicyError(f"the transformers backend cannot serve {name}: {first_line(error)}; {ADVICE}") from error
        finally:
            self.model.train(training)
            self._cache, self.stats = SlotCache(self._layers), Stats()
        tolerance = 1e-2 if self.model.dtype == torch.float32 else 0.2
        if not torch.allclose(served, alone, rtol=0, atol=tolerance * float(alone.nan_to_num().std() + 1e-6), equal_nan=True):
            raise PolicyError(f"the transformers backend cannot serve {name}: it ignores some positions or masks; {ADVICE}")

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    def refresh(self, version: int) -> None:
        """Note that the model's weights have changed to this version, and drop stored prefixes.

        Raises `PolicyError` while requests are being sampled.
        """
        if self._active or self._waiting:
            raise PolicyError("weights were changed while requests are being sampled; wait for them first")
        self._store.clear()
        self._cache = SlotCache(self._layers)
        self.version = version

    @property
    def _busy(self) -> bool:
        return bool(self._active)

    async def _round(self) -> None:
        started = time.perf_counter()
        try:
            self._step()
        finally:
            self.stats.busy_seconds += time.perf_counter() - started

    async def _failed(self, error: Exception) -> None:
        self._fail(PolicyError(f"the model failed: {first_line(error)}"))

    def _fail(self, error: PolicyError) -> None:
        """Fail all requests with this error; the engine continues with empty slots."""
        for row in [*self._active, *self._waiting]:
            row.fail(error)
        self._active.clear()
        self._waiting.clear()
        self._store.clear()
        self._cache = SlotCache(self._layers)

    @torch.inference_mode()
    def _step(self) -> None:
        """Drop cancelled requests, admit waiting ones, and decode one token for every active request."""
        for row in [row for row in self._active if row.stop is not None]:
            self._leave(row)
        self._waiting = deque(row for row in self._waiting if row.stop is None)
        free = self.max_batch - len(self._active)
        if self._waiting and free:
            self._patience += 1
            enough = len(self._waiting) >= min(free, max(len(self._active) // 4, 1))
            if enough or self._patience >= PATIENCE:
                self._patience = 0
                self._admit(free)
        if self._active:
            positions = torch.tensor([[row.length] for row in self._active])
            ids = torch.tensor([[row.last] for row in self._active])
            logits = self._forward(self._active, 0, ids, positions)[:, -1]
            self._emit(self._active, logits)
            for row in [row for row in self._active if row.stop is not None]:
                self._leave(row)
                row.done.set()

    def _admit(self, free: int) -> None:
        """Compute the prompts of up to `free` waiting requests and sample their first tokens."""
        chosen: list[tuple[RequestState, int, Memory]] = []
        later: list[RequestState] = []
        shared: set[int] = set()
        while self._waiting and len(chosen) < free:
            row = self._waiting.popleft()
            prompt = self._key(row)
            cached, memory = self._store.find(prompt)
            mates = []
            if len(prompt) > MIN_SHARED_PREFIX:
                mates = [(common_prefix(prompt, self._key(other)), n) for n, (other, _, _) in enumerate(chosen)]
            longest, mate = max(mates, default=(0, 0))
            if longest >= cached + MIN_SHARED_PREFIX:
                later.append(row)
                shared.add(mate)
                continue
            chosen.append((row, min(cached, len(prompt) - 1), memory))
        self._waiting.extendleft(reversed(later))
        promised = {id(chosen[n][0]) for n in shared}
        chosen.sort(key=lambda item: (len(item[0].request.prompt) - item[1], len(item[0].request.prompt)))
        try:
            self._prefill_all(chosen, promised)
        except Exception:
            # Requests whose prompts were not computed return to the queue, so that `_fail` reaches them.
            active = set(map(id, self._active))
            self._waiting.extendleft(row for row, _, _ in reversed(chosen) if id(row) not in active and row.stop is None)
            raise

    def _prefill_all(self, chosen: list[tuple[RequestState, int, Memory]], promised: set[int]) -> None:
        """Prefill in forward passes of at most `PREFILL_TOKENS` tokens, padding included."""
        while chosen:
            size = 1
            while size < len(chosen) and (size + 1) * (len(chosen[size][0].request.prompt) - chosen[size][1]) <= PREFILL_TOKENS:
                size += 1
            self._prefill(chosen[:size], promised)
            chosen = chosen[size:]

    def _prefill(self, batch: list[tuple[RequestState, int, Memory]], promised: set[int]) -> None:
        """Compute the prompts of (request, cached tokens, their memory); store those whose `id` is promised to waiting requests."""
        first = len(self._active)
        new = max(len(row.request.prompt) - cached for row, cached, _ in batch)
        # Right-padded: keys and values of padding lie past the row's end, and are overwritten later.
        ids = torch.zeros(len(batch), new, dtype=torch.long)
        starts = torch.tensor([[cached] for _, cached, _ in batch])
        positions = starts + torch.arange(new)
        self._cache.grow(first + len(batch), self._rounded(int(positions.max()) + 1))
        ends = []
        for i, (row, cached, memory) in enumerate(batch):
            prompt = row.request.prompt
            if cached:
                self._cache.put(first + i, memory, cached)
            ids[i, : len(prompt) - cached] = torch.tensor(prompt[cached:])
            ends.append(len(prompt) - cached - 1)
            row.partial.prefilled, row.partial.cached = len(prompt) - cached, cached
            row.version = self.version
            self.stats.prefilled += len(prompt) - cached
            self.stats.cached += cached
        keep = sorted(set(ends))
        rows = [row for row, _, _ in batch]
        # A long prompt is computed in pieces: a mask of all of it would grow with the square of its length.
        step = max(PREFILL_TOKENS // len(batch), 1)
        for at in range(0, new, step):
            inside = [end - at for end in keep if at <= end < at + step]
            logits = self._forward(rows, first, ids[:, at : at + step], positions[:, at : at + step], torch.tensor(inside or [0]))
        self._active += rows
        self._emit(rows, logits[torch.arange(len(rows)), torch.tensor([keep.index(end) for end in ends])])
        for i, row in enumerate(rows):
            if id(row) in promised:
                self._store.add(self._key(row), self._cache.take(first + i, len(row.request.prompt)))
        for row in [row for row in rows if row.stop is not None]:
            self._leave(row)
            row.done.set()

    def _rounded(self, length: int) -> int:
        """The length of slots for contexts of `length` tokens: the next multiple of 256."""
        return -(-length // 256) * 256

    def training_inputs(self, ids: torch.Tensor, rows: Sequence[Sequence[int]], media: Sequence[Sequence[Segment]]) -> Inputs:
        """The `inputs` of `token_logprobs` for a batch `ids` (B, T) of `rows` with their `media`, padded on the right."""
        return lambda model: {"input_ids": ids}

    def _key(self, row: RequestState) -> tuple[int, ...]:
        """The key of a request's prompt among stored prefixes: equal for prompts with equal text and equal media."""
        return row.request.prompt

    def _inputs(self, rows: list[RequestState], ids: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's arguments for new `ids` (b, m) at `positions` (b, m) of `rows`."""
        return {"input_ids": ids, "position_ids": positions.clamp(max=self._context - 1)}  # only padding lies beyond

    def _forward(
        self, rows: list[RequestState], first: int, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (b, kept, vocabulary) of new `ids` (b, m) at `positions` (b, m) of `rows` in slots `first` onward."""
        span = int(positions.max()) + 1
        self._cache.grow(first + len(ids), self._rounded(span))
        positions = positions.to(self.device)
        self._cache.aim(first, positions, span)
        # Additive, not bool: the CPU kernel would convert a bool mask into this one in every layer.
        hidden = (torch.arange(span, device=self.device) > positions[..., None]).unsqueeze(1)
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device).masked_fill_(hidden, torch.finfo(self.model.dtype).min)
        started = time.perf_counter()
        logits: torch.Tensor = self.model(
            **self._inputs(rows, ids.to(self.device), positions),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=0 if keep is None else keep.to(self.device),
        ).logits
        if logits.is_cuda:
            torch.cuda.synchronize()
        self.stats.forward_seconds += time.perf_counter() - started
        self.stats.steps += 1
        return logits

    def _emit(self, rows: list[RequestState], logits: torch.Tensor) -> None:
        """Sample one token per row from `logits` (rows, vocabulary) and append it."""
        tokens, logprobs = sample_tokens(logits, rows)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.emit(token, logprob)
        self.stats.generated += len(rows)

    def _leave(self, row: RequestState) -> None:
        """Free the row's slot: store its keys and values, and move the last row into its place."""
        slot, end = self._active.index(row), len(self._active) - 1
        tokens = row.length
        self._store.add((*self._key(row), *row.partial.ids)[:tokens], self._cache.take(slot, tokens))
        if slot != end:
            self._cache.move(end, slot, self._active[end].length)
            self._active[slot] = self._active[end]
        self._active.pop()


def _has_alibi(config: Any) -> bool:
    """Whether a model uses ALiBi: Bloom always does, Falcon and MPT if their configuration says so."""
    return config.model_type == "bloom" or any(getattr(part, "alibi", False) for part in (config, getattr(config, "attn_config", None)))
