"""A pool of two workers over gloo serves the runtime's requests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ramet.agents.budget import Budget
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import Message, Segment, Status
from ramet.attention.comm import RankGroup, SingleRank, simulated
from ramet.attention.methods import Method
from ramet.attention.settings import AttentionConfig
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import CheckpointError, PolicyError, TransientPolicyError
from ramet.media.clips import make_questions
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.engines.sequence_parallel import Pool, Replica, SequenceParallelPolicy, Step
from ramet.policy.engines.vision import VideoReader, VideoSettings, VisionPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.recipes.nano.vision import write_vision_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def policy(**attention: Any) -> SequenceParallelPolicy:
    return SequenceParallelPolicy(BASE, AttentionConfig(**{"method": "spava", "threshold": 10_000, **attention}), threads=1)


def request(prompt: tuple[int, ...], tokens: int = 12, seed: int = 0, temperature: float = 0.0) -> SampleRequest:
    return SampleRequest(prompt, tokens, frozenset(), seed, Sampling(temperature))


def prompts(count: int, shared: int = 60, own: int = 12) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(5, 30, (n,), generator=generator).tolist())  # noqa: E731
    start = draw(shared)
    return [start + draw(own) for _ in range(count)]


async def many(policy: Any, requests: list[SampleRequest]) -> list[Sample]:
    samples: dict[int, Sample] = {}

    async def one(index: int) -> None:
        samples[index] = await policy.sample(requests[index], Partial())

    async with anyio.create_task_group() as group:
        for index in range(len(requests)):
            group.start_soon(one, index)
    return [samples[index] for index in range(len(requests))]


async def test_short_prompts_are_sampled_exactly_as_on_one_host() -> None:
    requests = [request(p, seed=i, temperature=0.7) for i, p in enumerate(prompts(5))]
    model, _, _ = load_model(BASE)
    async with HFPolicy(model) as alone:
        expected = await many(alone, requests)
    async with policy() as pool:
        got = await many(pool, requests)
        again = await many(pool, requests)
    for ours, theirs, repeated in zip(got, expected, again, strict=True):
        assert ours.ids == theirs.ids == repeated.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert repeated.cached == len(prompts(1)[0]) - 1, "a prompt that is held is not read again"


async def test_long_prompts_are_read_approximately_and_siblings_share_the_reading() -> None:
    requests = [request(p) for p in prompts(3, shared=90)]
    model, _, _ = load_model(BASE)
    async with HFPolicy(model) as alone:
        expected = await many(alone, requests)
    async with policy(threshold=50, anchor=8, passing=1000) as pool:
        got = await many(pool, requests)
        assert [s.ids for s in got] == [s.ids for s in expected], "with everything passed on it is exact"
        assert [s.cached for s in got] == [0, 90, 90]
        turn = request(requests[1].prompt + got[1].ids + (7, 8, 9))
        later = await pool.sample(turn, Partial())
        assert later.cached == len(requests[1].prompt) + len(got[1].ids) - 1
    async with HFPolicy(model) as alone:
        assert later.ids == (await alone.sample(turn, Partial())).ids


class InProcess:
    """Workers that are simulated in this process, so that what each of them holds can be seen."""

    def __init__(self, hosts: int, method: Method) -> None:
        model, _, _ = load_model(BASE)
        self.replicas = [Replica(model, SingleRank(), method) for _ in range(hosts)]

    def run(self, step: Step) -> dict[int, Tensor]:
        def rank(group: RankGroup) -> dict[int, Tensor]:
            self.replicas[group.rank].group = group
            return self.replicas[group.rank].run(step)

        return simulated(len(self.replicas), rank)[0]

    def rows(self) -> list[list[int]]:
        """How many rows each worker keeps of each sequence, in the order of reading."""
        return [[replica.sequences[n].layers[0].rows for replica in self.replicas] for n in sorted(self.replicas[0].sequences)]

    def close(self) -> None: ...


def in_process(hosts: int, threshold: int = 50, **options: Any) -> SequenceParallelPolicy:
    attention = AttentionConfig(method="spava", hosts=hosts, threshold=threshold, anchor=8, passing=1000)
    policy = SequenceParallelPolicy(BASE, attention, **{"question": 8, **options})
    policy._start = lambda: InProcess(hosts, attention.build())
    return policy


async def dense(requests: list[SampleRequest]) -> list[Sample]:
    model, _, _ = load_model(BASE)
    async with HFPolicy(model) as alone:
        return await many(alone, requests)


def held(policy: SequenceParallelPolicy) -> list[list[int]]:
    assert isinstance(policy.workers, InProcess)
    return policy.workers.rows()


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize(("shared", "own"), [(27, 170), (60, 60), (100, 60)])
async def test_long_prompts_are_sharded_whatever_they_share(hosts: int, shared: int, own: int) -> None:
    requests = [request(p, 4) for p in prompts(3, shared, own)]
    async with in_process(hosts) as policy:
        got = await many(policy, requests)
        rows = held(policy)
    assert [s.ids for s in got] == [s.ids for s in await dense(requests)]
    assert [s.cached for s in got] == [0, 0, 0]
    for kept in rows:
        assert sum(kept) == shared + own + 3
        assert max(kept) <= (shared + own) / hosts + 8 + 3, "a share, the question and what was said"


async def test_long_prompts_with_short_ends_share_one_reading() -> None:
    requests = [request(p, 4) for p in prompts(3, shared=160, own=18)]
    async with in_process(4) as policy:
        got = await many(policy, requests)
        rows = held(policy)
    assert [s.ids for s in got] == [s.ids for s in await dense(requests)]
    assert [s.cached for s in got] == [0, 160, 160]
    assert all(max(kept) <= 160 / 4 + 18 + 3 for kept in rows)


async def test_what_is_held_is_not_continued_with_a_long_rest() -> None:
    """A short prompt is held; a long one begins with it. Later a turn brings a long result of a tool."""
    [first] = prompts(1, shared=20, own=0)
    [document], [result] = prompts(1, shared=0, own=150), prompts(1, shared=150, own=0)
    requests = [request(first, 4), request(first + document, 4), request(first + document + (7, 8), 4)]
    requests.append(request(requests[2].prompt + result, 4))
    async with in_process(2) as policy:
        got = [await policy.sample(given, Partial()) for given in requests]
        rows = held(policy)
    assert [s.ids for s in got] == [s.ids for s in await dense(requests)]
    assert [s.cached for s in got] == [0, 0, 170, 0]
    assert all(max(kept) <= sum(kept) / 2 + 16 for kept in rows[1:])


async def test_a_worker_that_dies_fails_what_is_in_flight_and_the_pool_restarts() -> None:
    async with policy() as pool:
        expected = await pool.sample(request(prompts(1)[0]), Partial())
        workers = pool.workers
        assert isinstance(workers, Pool)
        partial = Partial()

        async def kill() -> None:
            while len(partial.ids) < 3:
                await anyio.sleep(0.001)
            os.kill(workers.processes[1].pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            with pytest.raises(TransientPolicyError, match=r"worker of the sequence-parallel pool died \(.*rank 1 with status -9"):
                await pool.sample(request(prompts(1)[0], 400), partial)
        assert len(partial.ids) >= 3
        assert (await pool.sample(request(prompts(1)[0]), Partial())).ids == expected.ids
        assert pool.restarts == 1


async def test_a_worker_that_dies_in_the_middle_of_a_prefill_fails_it_and_the_pool_restarts() -> None:
    """One worker is halted, so the other has begun to read and waits for what it passes on; then the halted one is killed."""
    given = request(prompts(1, shared=300)[0])
    async with policy(threshold=50) as pool:
        expected = await pool.sample(request(prompts(1)[0]), Partial())
        assert isinstance(pool.workers, Pool)
        os.kill(pool.workers.processes[1].pid, signal.SIGSTOP)
        failures: list[str] = []

        async def read() -> None:
            with pytest.raises(TransientPolicyError) as caught:
                await pool.sample(given, Partial())
            failures.append(str(caught.value))

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await anyio.sleep(0.5)
            assert not failures
            os.kill(pool.workers.processes[1].pid, signal.SIGKILL)
        assert "rank 1 with status -9" in failures[0]
        assert (await pool.sample(request(prompts(1)[0]), Partial())).ids == expected.ids
        assert len((await pool.sample(given, Partial())).ids) == 12
        assert pool.restarts == 1


async def test_a_tree_survives_a_killed_worker() -> None:
    """The runtime retries; the answer is that of an undisturbed run."""
    _, _, chat = load_model(BASE)
    env = RowsEnvironment((12, 12), (48, 54), (5, 6), 9)
    [task] = env.tasks("iid", 1, 0)
    budget = Budget(generated=256, depth=1, width=16, turns=8, answer_reserve=8)

    async with policy(threshold=40, anchor=8, passing=1000) as pool:
        undisturbed = await Runtime(pool, chat).run(task, budget)
        assert isinstance(pool.workers, Pool)
        os.kill(pool.workers.processes[0].pid, signal.SIGKILL)
        tree = await Runtime(pool, chat).run(task, budget)
        assert pool.restarts == 1
    assert tree.root.status is Status.ANSWERED
    assert tree.answer == undisturbed.answer


async def test_cancelled_requests_stop_and_bad_ones_are_named() -> None:
    async with policy() as pool:
        partial = Partial()
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(pool.sample, request(prompts(1)[0], 300), partial)
                while len(partial.ids) < 3:
                    await anyio.sleep(0.001)
                group.cancel_scope.cancel()
        assert not scope.cancelled_caught
        await pool.sample(request(prompts(2)[1], 4), Partial())
        assert len(partial.ids) < 300
        with pytest.raises(PolicyError, match="exceed the context"):
            await pool.sample(request(prompts(1)[0], 100_000), Partial())
    with pytest.raises(PolicyError, match="not serving"):
        await pool.sample(request(prompts(1)[0]), Partial())
    with pytest.raises(PolicyError, match="give spava, apb or star"):
        policy(method="dense")


async def test_broken_weights_are_reported_not_sampled(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.save_pretrained(tmp_path)
    for file in BASE.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    save_model(model, str(tmp_path / "model.safetensors"), {"format": "pt"})
    async with SequenceParallelPolicy(tmp_path, AttentionConfig(method="spava"), threads=1) as pool:
        with pytest.raises(PolicyError, match="not finite"):
            await pool.sample(request(prompts(1)[0]), Partial())


async def test_a_model_that_workers_refuse_is_named_and_not_tried_again(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_neo",
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
        vocab_size=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in BASE.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="GPTNeoForCausalLM does not support") as raised:
        async with SequenceParallelPolicy(tmp_path, AttentionConfig(method="spava"), threads=1):
            pass
    assert not isinstance(raised.value, TransientPolicyError)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    import multiprocessing

    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("threshold", [4, 4096])
async def test_workers_that_see_say_what_one_process_says(tmp_path: Path, threshold: int) -> None:
    """Videos in prompts, exactly and by Spava with everything passed on; a later turn reads them no more."""
    video = VideoSettings(max_frames=8, max_pixels=56 * 56)
    rows = make_questions(tmp_path / "clips", 3, 1)
    write_vision_model(tmp_path / "model", ["What is there?", "And now, what is it?"] * 8, 0)
    model, tokenizer, chat = load_model(tmp_path / "model")
    reader = VideoReader(model.config, tokenizer, video)
    chat.placeholder_ids = reader.ids
    one, two, three = (Segment(str(tmp_path / "clips" / row["video"])) for row in rows)
    asked = []
    for text, media in (("What is there?", (one,)), ("What is there?", (two, three)), ("And now, what is it?", ())):
        prompt = tuple(chat.render([Message("user", text, media)], tools=()))
        asked.append(SampleRequest(prompt, 6, frozenset(), 0, Sampling(0.0), media=media))
    asked.append(replace(asked[0], prompt=(*asked[0].prompt, 70, 71)))  # a later turn

    async def said(policy: Any) -> list[Sample]:
        async with policy:
            return [await policy.sample(request, Partial()) for request in asked]

    alone = await said(VisionPolicy(model, reader))
    attention = AttentionConfig(method="spava", threshold=threshold, anchor=2, passing=2**40)
    shared = await said(SequenceParallelPolicy(tmp_path / "model", attention, question=4, threads=1, video=video))
    assert [s.ids for s in shared] == [s.ids for s in alone]
    assert len({s.ids for s in alone}) > 1
    assert [s.cached > 16 for s in shared] == [False, False, False, True]


def test_a_script_without_a_main_guard_is_told_so(monkeypatch):
    """Its workers end with a status of their own before they start workers in their turn, and the parent says why."""

    class Ended(BaseException):
        pass

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        Pool(None)  # type: ignore[arg-type]
    worker = multiprocessing.get_context("spawn").Process(target=sys.exit, args=ended.value.args)
    monkeypatch.undo()
    worker.start()
    worker.join()
    pool = Pool.__new__(Pool)
    pool.processes = [worker]
    said = pool._died()
    assert "__main__" in str(said) and not isinstance(said, TransientPolicyError)
