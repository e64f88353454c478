"""The transformers backend: continuous batching of whatever trees ask for, on CPU or CUDA.

    async with HFPolicy(model) as policy:
        sample = await policy.sample(request, Partial())

New requests join the running batch and finished ones leave it at any step. A request's prompt is computed
only from where no stored prefix covers it. The engine runs on the event loop's own thread, one
forward pass between two turns of the loop, so a run on the asyncio backend is deterministic.

Seeds (see `drawing`). Batch mates change nothing but rounding: a matrix product over another
number of rows, or a prefix computed in another batch, can differ in the last bits of float32 (about 1e-6 in a
log-probability), and a token differs only if its random number falls within that of a boundary. In
bfloat16 the differences are about 1e-2 and tokens do change with the batch.
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
from ramet.policy.engines.sampler import RequestState, draw
from ramet.policy.engines.serving import Serving
from ramet.policy.models.load import Inputs, steady_context

PREFILL_TOKENS = 2048
"""Padded prompt tokens of one forward pass at most."""
SHARE = 32
"""A request waits one step for a batch mate with which it shares this many prompt tokens more than are stored."""
PATIENCE = 6
"""Decode steps that new requests wait, at most, to be computed together."""
OTHER = "choose another backend"


@dataclass(slots=True)
class Stats:
    """What the engine did since it was made. `forward_seconds` is inside the model, `busy_seconds` inside steps."""

    steps: int = 0
    generated: int = 0
    prefilled: int = 0
    cached: int = 0
    forward_seconds: float = 0.0
    busy_seconds: float = 0.0


class HFPolicy(Serving):
    """Samples from one causal language model. Enter it to serve.

    model           any transformers causal LM with full attention (`attn_implementation="sdpa"`), latent attention too
    max_batch       rows that decode together
    context         longest context; by default, and at most, the longest in which a row does not depend on others (`steady_context`)
    prefix_bytes    memory for contexts kept for reuse by later turns and siblings

    Raises `PolicyError` for a model that it cannot serve exactly: a few tokens are computed in slots and by the model itself.
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
            raise PolicyError(f"{type(model).__name__} attends by distance (ALiBi), which the transformers backend does not serve; {OTHER}")
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise PolicyError(f"attention {model.config._attn_implementation!r} cannot take the batch mask; load the model with sdpa")
        longest = steady_context(model.config)
        if max_batch < 1 or prefix_bytes < 0 or not 2 <= (context or longest) <= longest:
            given = f"max_batch {max_batch}, context {context}, prefix_bytes {prefix_bytes}"
            raise PolicyError(f"{given}: there must be a row, and a context of 2 to {longest}")
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
        """Two rows of unlike length, read and decoded in slots, against the model's own pass over each. Raises `PolicyError`."""
        training, name = self.model.training, type(self.model).__name__
        vocabulary = self.model.get_input_embeddings().num_embeddings
        prompts = [tuple((7 * i + n) % vocabulary for i in range(3 + 2 * n)) for n in (0, 1)]
        rows = [RequestState(SampleRequest(prompt, 1, frozenset()), Partial()) for prompt in prompts]
        texts = [torch.tensor(prompt) for prompt in prompts]
        read = [len(text) - 1 for text in texts]
        self.model.eval()
        try:
            padded = torch.nn.utils.rnn.pad_sequence([text[:-1] for text in texts], batch_first=True)
            self._forward(rows, 0, padded, torch.arange(max(read)).expand(2, -1))
            served = self._forward(rows, 0, torch.stack([text[-1:] for text in texts]), torch.tensor(read)[:, None])[:, -1].float()
            alone = torch.stack([self.model(input_ids=text[None].to(self.device), use_cache=False).logits[0, -1] for text in texts]).float()
        except Exception as error:  # whatever a model that takes other arguments raises
            raise PolicyError(f"the transformers backend cannot serve {name}: {first_line(error)}; {OTHER}") from error
        finally:
            self.model.train(training)
            self._cache, self.stats = SlotCache(self._layers), Stats()
        close = 1e-2 if self.model.dtype == torch.float32 else 0.2
        if not torch.allclose(served, alone, rtol=0, atol=close * float(alone.nan_to_num().std() + 1e-6), equal_nan=True):
            raise PolicyError(f"the transformers backend cannot serve {name}: it does not take positions and masks as given; {OTHER}")

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def refresh(self, version: int) -> None:
        """Tell the engine that the model's weights have changed: stored prefixes are dropped."""
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
        """Everything in flight fails; the engine goes on with empty slots."""
        for row in [*self._active, *self._waiting]:
            row.fail(error)
        self._active.clear()
        self._waiting.clear()
        self._store.clear()
        self._cache = SlotCache(self._layers)

    @torch.inference_mode()
    def _step(self) -> None:
        """Drop what was cancelled, admit what waits, and decode one token for every row."""
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
            found, memory = self._store.find(prompt)
            mates = [(common_prefix(prompt, self._key(other)), n) for n, (other, _, _) in enumerate(chosen)] if len(prompt) > SHARE else []
            longest, mate = max(mates, default=(0, 0))
            if longest >= found + SHARE:
                later.append(row)
                shared.add(mate)
                continue
            chosen.append((row, min(found, len(prompt) - 1), memory))
        self._waiting.extendleft(reversed(later))
        promised = {id(chosen[n][0]) for n in shared}
        chosen.sort(key=lambda item: (len(item[0].request.prompt) - item[1], len(item[0].request.prompt)))
        try:
            self._prefill_all(chosen, promised)
        except Exception:
            # What was not computed goes back to the queue, so that `_fail` finds it.
            held = set(map(id, self._active))
            self._waiting.extendleft(row for row, _, _ in reversed(chosen) if id(row) not in held and row.stop is None)
            raise

    def _prefill_all(self, chosen: list[tuple[RequestState, int, Memory]], promised: set[int]) -> None:
        """Prefill in passes of at most `PREFILL_TOKENS` padded tokens."""
        while chosen:
            size = 1
            while size < len(chosen) and (size + 1) * (len(chosen[size][0].request.prompt) - chosen[size][1]) <= PREFILL_TOKENS:
                size += 1
            self._prefill(chosen[:size], promised)
            chosen = chosen[size:]

    def _prefill(self, batch: list[tuple[RequestState, int, Memory]], promised: set[int]) -> None:
        first = len(self._active)
        new = max(len(row.request.prompt) - found for row, found, _ in batch)
        # Right-padded: what a padding token writes lies past the row's end and is overwritten later.
        ids = torch.zeros(len(batch), new, dtype=torch.long)
        starts = torch.tensor([[found] for _, found, _ in batch])
        positions = starts + torch.arange(new)
        self._cache.grow(first + len(batch), self._rounded(int(positions.max()) + 1))
        ends = []
        for i, (row, found, memory) in enumerate(batch):
            prompt = row.request.prompt
            if found:
                self._cache.put(first + i, memory, found)
            ids[i, : len(prompt) - found] = torch.tensor(prompt[found:])
            ends.append(len(prompt) - found - 1)
            row.partial.prefilled, row.partial.cached = len(prompt) - found, found
            row.version = self.version
            self.stats.prefilled += len(prompt) - found
            self.stats.cached += found
        keep = sorted(set(ends))
        rows = [row for row, _, _ in batch]
        # A long prompt by itself goes in pieces: the mask of a whole one would grow with the square of its length.
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
        return -(-length // 256) * 256

    def training_inputs(self, ids: torch.Tensor, rows: Sequence[Sequence[int]], media: Sequence[Sequence[Segment]]) -> Inputs:
        """For `token_logprobs` on a batch `ids` (B, T) of whole rows, padded on the right."""
        return lambda model: {"input_ids": ids}

    def _key(self, row: RequestState) -> tuple[int, ...]:
        """The request's prompt as it is stored: the same for prompts that say and show the same."""
        return row.request.prompt

    def _inputs(self, rows: list[RequestState], ids: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is called with for new `ids` (b, m) at `positions` (b, m) of `rows`."""
        return {"input_ids": ids, "position_ids": positions.clamp(max=self._context - 1)}  # only padding stands further

    def _forward(
        self, rows: list[RequestState], first: int, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (b, kept, vocabulary) of new `ids` (b, m) at `positions` (b, m) of `rows` in slots `first` onward."""
        span = int(positions.max()) + 1
        self._cache.grow(first + len(ids), self._rounded(span))
        positions = positions.to(self.device)
        self._cache.aim(first, positions, span)
        # Additive, not bool: the CPU kernel turns a bool mask into this one anyhow, once a layer.
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
        """Draw one token per row from `logits` (rows, vocabulary) and append it."""
        tokens, logprobs = draw(logits, rows)
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            row.emit(token, logprob)
        self.stats.generated += len(rows)

    def _leave(self, row: RequestState) -> None:
        """Free the row's slot: keep its memory for later, move the last row into its place."""
        slot, end = self._active.index(row), len(self._active) - 1
        tokens = row.length
        self._store.add((*self._key(row), *row.partial.ids)[:tokens], self._cache.take(slot, tokens))
        if slot != end:
            self._cache.move(end, slot, self._active[end].length)
            self._active[slot] = self._active[end]
        self._active.pop()


def _has_alibi(config: Any) -> bool:
    """Bloom has it always, Falcon and MPT where their configuration says so."""
    return config.model_type == "bloom" or any(getattr(each, "alibi", False) for each in (config, getattr(config, "attn_config", None)))
