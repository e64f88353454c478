"""Long contexts on several workers: Spava (arXiv:2601.21444) prefills them in parallel, and all workers decode over their shards.

    async with SequenceParallelPolicy(model_dir, AttentionConfig(method="spava", hosts=2, threshold=4096)) as policy:
        sample = await policy.sample(request, Partial())

Every worker has the whole model and a shard of each context. Prompts of more than `threshold` tokens are prefilled with the
given method (Spava), shorter ones exactly. Waiting requests with a common prefix share one prefill: the prefix is the
context, and the question of the first request selects what Spava passes on; all questions then attend to the
whole context. Later turns of a branch, and later siblings, continue from the longest stored context that is a prefix of
their prompt. Only the context is sharded: all workers compute the tokens after it, and one stores them. A long prompt
therefore reuses a context only if the tokens after it are the question, or at most half of a worker's share of
the prompt; otherwise it is prefilled again, in shards. An approximate prefill thus depends on which request came first; an
exact one depends on the request alone, up to rounding. Video frames are distributed over the workers' vision towers.

Workers are processes of this machine (`hosts`), or the ranks of a torchrun job: `SequenceParallelPolicy.torchrun` on rank 0
and `follow` on the others. If a worker dies, requests in progress fail with `TransientPolicyError`, which the
runtime retries, and the pool is started again.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import anyio
import anyio.to_thread
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ramet.agents.tree import Segment
from ramet.attention import cache, hf
from ramet.attention.comm import DistributedGroup, RankGroup
from ramet.attention.methods import Method
from ramet.attention.settings import AttentionConfig
from ramet.attention.vision import prefill_video
from ramet.errors import PolicyError, RametError, TransientPolicyError, first_line
from ramet.policy.engines.kv import common_prefix
from ramet.policy.engines.sampler import RequestState, sample_tokens
from ramet.policy.engines.serving import Serving
from ramet.policy.engines.vision import VideoReader, VideoSettings, media_key
from ramet.policy.models.load import load_model

EXACT = Method("spava", anchor=0, passing=2**62)
"""Every block passes on everything: exact, with the context stored apart from the question, as by the approximate method."""
START_SECONDS = 300.0
"""Seconds that workers may take to load the model and to connect."""


@dataclass(frozen=True)
class Step:
    """What all ranks do next, in this order: drop, prefill, fork, extend. Sequences have numbers.

    drops    numbers
    reads    prefills: (number, ids, tokens of the question, whether approximate, media)
    forks    (from number, to number, tokens to keep)
    extends  (number, ids)
    """

    drops: list[int] = field(default_factory=list)
    reads: list[tuple[int, tuple[int, ...], int, bool, tuple[Segment, ...]]] = field(default_factory=list)
    forks: list[tuple[int, int, int]] = field(default_factory=list)
    extends: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


class Replica:
    """The model of one rank and its shards of sequences."""

    def __init__(self, model: Any, group: RankGroup, method: Method, reader: VideoReader | None = None) -> None:
        hf.attach(model)
        self.model, self.group, self.method, self.reader = model, group, method, reader
        self.sequences: dict[int, cache.SequenceShard] = {}

    def run(self, step: Step) -> dict[int, Tensor]:
        """Do a step. Returns the logits (vocabulary,) after the last token of each sequence prefilled or extended; equal on all ranks."""
        for number in step.drops:
            del self.sequences[number]
        logits: dict[int, Tensor] = {}
        for number, ids, query, approximate, media in step.reads:
            method = self.method if approximate else EXACT
            if self.reader is not None:
                videos = [self.reader(segment).video for segment in media]
                self.sequences[number], out = prefill_video(self.model, self.group, method, list(ids), query, videos)
            else:
                (self.sequences[number],), out = hf.prefill(self.model, self.group, method, [list(ids)], [query])
            logits[number] = out[0]
        for source, number, rows in step.forks:
            self.sequences[number] = self.sequences[source].fork(rows)
        if step.extends:
            sequences = [self.sequences[number] for number, _ in step.extends]
            out = hf.extend(self.model, self.group, sequences, [list(ids) for _, ids in step.extends], self.method)
            logits |= {number: row for (number, _), row in zip(step.extends, out, strict=True)}
        return logits


class Workers(Protocol):
    """All ranks, as the policy uses them."""

    def run(self, step: Step) -> dict[int, Tensor]:
        """Do a step, as `Replica.run`. Blocks. Raises `TransientPolicyError` if a worker has died, `PolicyError` if the model failed."""

    def close(self) -> None:
        """Stop the ranks."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker process needs to start."""

    path: Path
    attention: AttentionConfig
    dtype: torch.dtype
    threads: int
    video: VideoSettings | None = None


def _worker(rank: int, config: WorkerConfig, store: str, pipe: Connection) -> None:
    """The process of one worker: run steps until the pipe closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(config.threads)
    hosts = config.attention.hosts
    try:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=hosts, timeout=timedelta(seconds=START_SECONDS))
        mesh = init_device_mesh("cpu", (hosts,), mesh_dim_names=("sequence",))
        try:
            model, tokenizer, _ = load_model(config.path, dtype=config.dtype)
            reader = None if config.video is None else VideoReader(model.config, tokenizer, config.video)
            replica = Replica(model, DistributedGroup(mesh.get_group("sequence")), config.attention.build(), reader)
        except Exception as error:  # reported to the policy, which ends the pool
            pipe.send(_ours(error))
            pipe.recv()
            return
        pipe.send(None)
        while True:
            step = pipe.recv()
            try:
                logits = replica.run(step)
            except Exception as error:  # reported to the policy, which fails the requests in progress
                pipe.send(_ours(error))
                continue
            pipe.send({number: row.float().cpu() for number, row in logits.items()} if rank == 0 else {})
    except (EOFError, ConnectionError):
        return


def _ours(error: Exception) -> RametError:
    """An error of ours as it is, any other one as a `PolicyError`, which a process that lacks its class can read too."""
    return error if isinstance(error, RametError) else PolicyError(f"the model failed: {first_line(error)}")


UNGUARDED = 97
"""The exit status of a worker that found itself starting workers while it imported the main script."""


class Pool:
    """Worker processes on this machine, connected by gloo."""

    def __init__(self, config: WorkerConfig) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            os._exit(UNGUARDED)  # a worker, while it imports the script that starts workers
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ramet-pool-")
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(config.attention.hosts):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, config, f"{self._folder.name}/store", theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        try:
            self._collect()
        except BaseException:
            self.close()
            raise

    def run(self, step: Step) -> dict[int, Tensor]:
        """As `Workers.run`."""
        try:
            for pipe in self._pipes:
                pipe.send(step)
        except OSError as error:
            raise self._died() from error
        logits: dict[int, Tensor] = self._collect()[0]
        return logits

    def _collect(self) -> list[Any]:
        """One message from every worker. Raises `PolicyError` if one fails, `TransientPolicyError` if one dies."""
        replies: dict[int, Any] = {}
        sentinels = [process.sentinel for process in self.processes]
        while len(replies) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            ready = wait([*waiting, *sentinels])
            for pipe in ready:
                if isinstance(pipe, Connection):
                    try:
                        reply = pipe.recv()
                    except (EOFError, OSError) as error:
                        raise self._died() from error
                    if isinstance(reply, RametError):
                        # If a worker dies, the others fail at their next exchange, and may report it first.
                        raise self._died() if wait(sentinels, 1.0) else reply
                    replies[self._pipes.index(pipe)] = reply
            if not any(isinstance(pipe, Connection) for pipe in ready):
                raise self._died()
        return [replies[rank] for rank in range(len(self._pipes))]

    def _died(self) -> PolicyError:
        for process in self.processes:
            process.join(0.2)
        if any(process.exitcode == UNGUARDED for process in self.processes):
            return PolicyError('worker processes import the script that starts them: put its code under `if __name__ == "__main__":`')
        dead = [f"rank {rank} with status {p.exitcode}" for rank, p in enumerate(self.processes) if p.exitcode is not None]
        return TransientPolicyError(f"a worker of the sequence-parallel pool died ({', '.join(dead) or 'its pipe broke'})")

    def close(self) -> None:
        """Stop the workers; those that do not end at once are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


class Ranks:
    """The ranks of a torchrun job, seen from rank 0; the others run `follow`."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._closed = False

    def started(self) -> Ranks:
        """These ranks. Raises `PolicyError` once they have stopped: they cannot be started again from here."""
        if self._closed:
            raise PolicyError("the ranks of this torchrun job have stopped; start the job again")
        return self

    def run(self, step: Step) -> dict[int, Tensor]:
        """As `Workers.run`; an error of a rank is final."""
        try:
            dist.broadcast_object_list([step], 0)
            return {number: row.float().cpu() for number, row in self._replica.run(step).items()}
        except RuntimeError as error:
            raise PolicyError(f"a rank of the job has failed: {first_line(error)}; start the job again") from error

    def close(self) -> None:
        """Let the other ranks return from `follow`."""
        if not self._closed:
            self._closed = True
            dist.broadcast_object_list([None], 0)


def follow(replica: Replica) -> None:
    """Run on every rank but the first of a torchrun job: do the steps of rank 0, until it closes."""
    while True:
        box: list[Step | None] = [None]
        dist.broadcast_object_list(box, 0)
        if box[0] is None:
            return
        replica.run(box[0])


@dataclass(slots=True, eq=False)
class _Held:
    """A sequence that the workers store: its key, how many of its tokens are context, and the request that it is decoded for, if any."""

    number: int
    tokens: list[int]
    context: int
    row: RequestState | None = None


class SequenceParallelPolicy(Serving):
    """Samples from one causal language model on several workers. Enter it to serve; see the docstring of the module.

    attention  the method, on how many workers, and for which prompts
    question   tokens at the end of an unshared prompt that select what is passed on
    keep       sequences that are stored for later turns, at most
    video      how a vision-language model samples videos; None: requests have text alone
    """

    def __init__(
        self,
        path: Path,
        attention: AttentionConfig,
        *,
        question: int = 64,
        keep: int = 64,
        max_batch: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
        video: VideoSettings | None = None,
    ) -> None:
        if attention.method == "dense":
            raise PolicyError("dense has no context to share between siblings; give spava, apb or star")
        threads = threads or max(1, (os.cpu_count() or 1) // attention.hosts)
        worker = WorkerConfig(path, attention, getattr(torch, dtype), threads, video)
        self._start: Callable[[], Workers] = partial(Pool, worker)
        config = _config(path)
        super().__init__(int(config.get_text_config().max_position_embeddings))
        self.vision = video is not None
        self._placeholder: int = getattr(config, "video_token_id", -1)
        self.restarts = 0
        self._hosts, self._threshold = attention.hosts, attention.threshold
        self._question, self._keep, self._max_batch = question, keep, max_batch
        self._workers: Workers | None = None
        self._next = 0
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._drops: list[int] = []

    @classmethod
    def torchrun(cls, path: Path, replica: Replica, attention: AttentionConfig, **options: Any) -> SequenceParallelPolicy:
        """The policy on rank 0 of a torchrun job whose other ranks run `follow`. If a rank fails, the job has failed."""
        policy = cls(path, attention.model_copy(update={"hosts": replica.group.size}), **options)
        policy._start = Ranks(replica).started
        return policy

    @property
    def workers(self) -> Workers | None:
        """The workers, while the policy serves."""
        return self._workers

    async def __aenter__(self) -> Self:
        self._workers = await anyio.to_thread.run_sync(self._start)
        return await super().__aenter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            return await super().__aexit__(kind, error, trace)
        finally:
            if self._workers is not None:
                self._workers.close()
                self._workers = None

    @property
    def _busy(self) -> bool:
        return bool(self._active())

    async def _failed(self, error: Exception) -> None:
        """Fail all requests and start new workers: the state of the old ones' sequences is unknown."""
        assert self._workers is not None
        self._fail(error if isinstance(error, PolicyError) else PolicyError(f"the model failed: {first_line(error)}"))
        await anyio.to_thread.run_sync(self._workers.close)
        self._drops.clear()
        self.restarts += 1
        self._workers = await anyio.to_thread.run_sync(self._start)

    def _fail(self, error: PolicyError) -> None:
        for row in [*(held.row for held in self._active() if held.row), *self._waiting]:
            row.fail(error)
        self._held.clear()
        self._waiting.clear()

    def _active(self) -> list[_Held]:
        return [held for held in self._held.values() if held.row is not None]

    async def _round(self) -> None:
        """One step of all ranks: sample one token for every active sequence, and prefill or continue waiting requests."""
        assert self._workers is not None
        for held in self._active():
            if held.row is not None and held.row.stop is not None:
                held.row = None
        self._waiting = deque(row for row in self._waiting if row.stop is None)
        step = Step(drops=self._drops)
        decoding = self._active()
        batch = [*decoding]
        while self._waiting and len(batch) < self._max_batch:
            batch.append(self._admit(self._waiting.popleft(), step))
        for held in decoding:
            assert held.row is not None
            step.extends.append((held.number, (held.row.last,)))
        for number, ids in step.extends:
            self._held[number].tokens.extend(ids)
        self._drops = self._evicted()
        if not batch:
            return
        logits = await anyio.to_thread.run_sync(self._workers.run, step)
        rows = [held.row for held in batch if held.row is not None]
        tokens, logprobs = sample_tokens(torch.stack([logits[held.number] for held in batch]), rows)
        for held, row, token, logprob in zip(batch, rows, tokens, logprobs, strict=True):
            row.emit(token, logprob)
            if row.stop is not None:
                held.row = None
                row.done.set()

    def _evicted(self) -> list[int]:
        """Drop the least recently used idle sequences beyond `keep`. Returns their numbers."""
        idle = [held.number for held in self._held.values() if held.row is None]
        evicted = idle[: max(len(self._held) - self._keep, 0)]
        for number in evicted:
            del self._held[number]
        return evicted

    def _admit(self, row: RequestState, step: Step) -> _Held:
        """Continue from a stored sequence, or prefill the prompt with the prefix that waiting requests share as its context."""
        prompt, key = row.request.prompt, self._key(row)
        row.version = self.version
        source, cached = self._find(key)
        if key[cached:] != prompt[cached:]:
            source, cached = None, 0  # the rest contains a video, which only a whole prompt may
        self._next += 1
        if source is None:
            approximate = len(prompt) > self._threshold
            context = len(prompt) - min(self._question if approximate else 1, len(prompt))
            if approximate:
                shared = min(max((common_prefix(key, self._key(other)) for other in self._waiting), default=0), len(prompt) - 1)
                context = shared if self._sharded(len(prompt), shared) else context
            held = _Held(self._next, list(key), context, row)
            step.reads.append((held.number, prompt, len(prompt) - context, approximate, row.request.media))
        else:
            self._held.move_to_end(source.number)
            held = _Held(self._next, list(key[:cached]), source.context, row)
            step.forks.append((source.number, held.number, cached))
            step.extends.append((held.number, prompt[cached:]))
        self._held[held.number] = held
        row.partial.prefilled, row.partial.cached = len(prompt) - cached, cached
        return held

    def _key(self, row: RequestState) -> tuple[int, ...]:
        return media_key(row.request.prompt, row.request.media, self._placeholder)

    def _find(self, prompt: Sequence[int]) -> tuple[_Held | None, int]:
        """(sequence, length): the stored sequence with the longest prefix in common with the prompt, all of its context included.

        At least one token of the prompt is left to compute. (None, 0) if there is no such sequence.
        """
        best: tuple[_Held | None, int] = (None, 0)
        for held in self._held.values():
            covered = min(common_prefix(prompt, held.tokens), len(prompt) - 1)
            if held.context <= covered and covered > best[1] and self._sharded(len(prompt), held.context):
                best = held, covered
        return best

    def _sharded(self, length: int, context: int) -> bool:
        """Whether a prompt of this length may use a context of this length; see the docstring of the module."""
        return length <= self._threshold or length - context <= max(self._question, length // (2 * self._hosts))


def open_ranks(path: Path, model: Any, attention: AttentionConfig) -> SequenceParallelPolicy | None:
    """The policy of a torchrun job, with as many hosts as it has ranks. On all ranks but the first, None once the first has closed."""
    dist.init_process_group("gloo")
    replica = Replica(model, DistributedGroup(), attention.build())
    if replica.group.rank:
        follow(replica)
        return None
    return SequenceParallelPolicy.torchrun(path, replica, attention)


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True)
