"""The real vLLM, in process and as a server, beside transformers. `make test-vllm` makes an environment for it and runs this."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.journal import read_records
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, SampleRequest, Sampling
from ramet.agents.tree import Message, Tree
from ramet.env.arithmetic import RowsEnvironment
from ramet.errors import PolicyError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.engines.openai import ChatPolicy, CompletionsPolicy, ResponsesPolicy, WireFormat
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from tests.cancelling import cancelled

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from ramet.policy.engines.vllm import VLLMPolicy

BUDGET = Budget(generated=384, depth=1, answer_reserve=8, context=768)
TASKS = RowsEnvironment((3, 24)).tasks("iid", 12, 0)


async def grown(policy: Any, chat: Any, temperature: float = 0.0) -> dict[str, Tree]:
    runtime = Runtime(policy, chat, Sampling(temperature))
    async with runtime.run_many([Job(task, BUDGET, 1) for task in TASKS]) as trees:
        return {job.task.id: tree async for job, tree in trees}


def ids(trees: dict[str, Tree]) -> dict[str, list[list[int]]]:
    return {name: [branch.ids for branch in tree.branches] for name, tree in trees.items()}


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any, Any]:
    torch.set_num_threads(1)
    return load_model(BASE)


@pytest.fixture(scope="module")
def expected(base) -> dict[str, Tree]:
    model, _, chat = base

    async def main() -> dict[str, Tree]:
        async with HFPolicy(model) as policy:
            return await grown(policy, chat)

    return anyio.run(main)


async def logprobs(policy: Any, prompt: tuple[int, ...]) -> tuple[float, ...]:
    """Of twelve tokens at temperature 1, and the tokens."""
    sample = await policy.sample(SampleRequest(prompt, 12, frozenset(), 5, Sampling(1.0)), Partial())
    return sample.ids, sample.logprobs


def scored(model: Any, prompt: tuple[int, ...], said: tuple[int, ...]) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(said)[:, None])[:, 0].tolist()


def test_the_engine_in_process(base, expected, tmp_path: Path) -> None:
    """The same trees as transformers; log-probabilities; abort; prefix cache; new weights; what it refuses."""
    model, tokenizer, chat = base
    other = load_model(BASE)[0]
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.02)
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = tuple(expected[TASKS[0].id].root.prompt)

    async def main() -> None:
        async with VLLMPolicy(BASE, dtype="float32") as policy:
            assert policy.context == model.config.max_position_embeddings
            trees = await grown(policy, chat)
            assert ids(trees) == ids(expected)
            assert all(trees[name].usage.generated == tree.usage.generated for name, tree in expected.items())
            assert any(tree.spawned for tree in trees.values())
            said, values = await logprobs(policy, prompt)
            assert values == pytest.approx(scored(model, prompt, said), abs=1e-4)
            assert (await logprobs(policy, prompt)) == (said, values), "a seed gives its tokens again"

            long = tuple(range(5, 25)) * 20
            first = await policy.sample(SampleRequest(long, 2, frozenset()), Partial())
            second = await policy.sample(SampleRequest(long, 2, frozenset()), Partial())
            assert first.cached == 0 and second.cached >= 128 and second.cached + second.prefilled == len(long)

            partial = await cancelled(policy, SampleRequest(prompt, 700, frozenset()))
            assert 700 > len(partial.ids) == len(partial.logprobs) > 0
            # Nothing runs on: the engine drops its cache only when it is idle.
            with anyio.fail_after(20):
                await policy.forget()
            await while_it_is_sampled(policy, prompt, tmp_path, model, other)
            said, values = await logprobs(policy, prompt)
            assert values == pytest.approx(scored(other, prompt, said), abs=1e-4)
            assert (await policy.sample(SampleRequest(prompt, 2, frozenset()), Partial())).version == 7

            with pytest.raises(PolicyError, match="exceed the context"):
                await policy.sample(SampleRequest(prompt, 100_000, frozenset()), Partial())

    anyio.run(main)


async def while_it_is_sampled(policy: VLLMPolicy, prompt: tuple[int, ...], path: Path, before: Any, after: Any) -> None:
    """New weights in the middle of samples: every token's log-probability is that of the weights that its version names."""
    partials, samples = [Partial() for _ in range(3)], []

    async def one(seed: int, partial: Partial) -> None:
        samples.append(await policy.sample(SampleRequest(prompt, 300, frozenset(), seed, Sampling(1.0)), partial))

    async with anyio.create_task_group() as group:
        for seed, partial in enumerate(partials):
            group.start_soon(one, seed, partial)
        while min(len(partial.ids) for partial in partials) < 5:
            await anyio.sleep(0.01)
        await policy.update(path, 7)
    for sample in samples:
        (count,) = sample.updates[:1]
        assert sample.version == 0 and sample.updates == (count,) * 7 and 5 <= count < 300 == len(sample.ids)
        assert sample.prefilled + sample.cached == len(prompt), "what is read again is not charged"
        whole = scored(before, prompt, sample.ids[:count]) + scored(after, (*prompt, *sample.ids[:count]), sample.ids[count:])
        assert sample.logprobs == pytest.approx(whole, abs=1e-3)
    assert policy.recomputed >= 3 * 5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


NANO = """\
{{- '<|begin|>' }}{%- if tools %}{{- '<|tools|>' }}{%- endif %}
{%- for m in messages if m.role != 'system' %}
{{- '<|' + m.role + '|>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{%- set written = {'name': call.function.name, 'arguments': call.function.arguments} | tojson(separators=(',', ':')) %}
{{- '<tool_call>' + written + '</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
"""The format of the shipped model as a chat template."""
NATIVE = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
"""What makes vLLM take tools."""


@contextmanager
def serving(port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A vLLM server of the shipped model; killed with everything that it started."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BASE), "--served-model-name", "nano",
        "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details", *options,
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(port, process)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(port: int, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def evaluation(folder: Path, port: int | None) -> subprocess.Popen[bytes]:
    """`ramet eval` of the shipped model, by transformers or through the server at `port`.

    Sums that it is sure of, alone, with tokens to spare: what a broken attempt had generated is charged, and must change no answer.
    """
    server = ["--set", "backend=completions", "--set", f"url=http://127.0.0.1:{port}/v1"] if port else []
    command = [
        sys.executable, "-m", "ramet.cli.main", "eval", "--policy", "nano", "--runs", str(folder), "--name", "e", "--set", "eval.tasks=40",
        "--set", "eval.budgets=[192,256]", "--set", "eval.ood_budgets=[256]", "--no-spawn", "--set", "env.operands=[2,7]",
        "--set", "env.ood_operands=[7,8]", "--set", "threads=1", *server,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outcomes(folder: Path) -> dict[tuple[Any, ...], Any]:
    records = read_records(folder / "e" / "journal.jsonl")
    found = {(r["split"], r["budget"], r["task"]): (r["score"], r["outcome"]["answer"]) for r in records}
    assert len(found) == len(records), "nothing is counted twice"
    return found


def test_a_server(base, expected, tmp_path: Path, caplog) -> None:
    """The same trees through a server; an evaluation through it is that by transformers, though it is killed and started again."""
    _, _, chat = base
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"

    async def main() -> None:
        async with CompletionsPolicy(url) as policy:
            assert (policy.model, policy.context) == ("nano", base[0].config.max_position_embeddings)
            assert ids(await grown(policy, chat)) == ids(expected)
            long = tuple(range(5, 25)) * 20
            for cached in (0, 128):
                sample = await policy.sample(SampleRequest(long, 2, frozenset()), Partial())
                assert sample.cached >= cached and sample.cached + sample.prefilled == len(long)
            partial = await cancelled(policy, SampleRequest(long[:40], 700, frozenset()))
            assert 700 > len(partial.ids) == len(partial.logprobs) > 0
        wire = WireFormat()
        async with ChatPolicy(url, wire) as policy:
            with pytest.raises(PolicyError, match="chat template"):
                await policy.sample(SampleRequest((1, wire.piece("3+4"), wire.END, 2), 4, wire.stop_ids), Partial())

    async def with_messages(caplog: Any) -> None:
        """Through either endpoint the trees are those of the tokens; calls and results go as such, and nothing is refused."""
        wire = WireFormat()
        for kind in (ChatPolicy, ResponsesPolicy):
            async with kind(url, wire) as policy:
                trees = await grown(policy, wire)
                partial = await cancelled(policy, SampleRequest(tuple(wire.render([Message("user", "3+4")], ())), 700, wire.stop_ids))
                assert len(partial.ids) == len(partial.logprobs)
            for name, tree in trees.items():
                same = expected[name]
                assert (tree.answer, tree.usage.clones, tree.usage.generated) == (same.answer, same.usage.clones, same.usage.generated)
            assert sum(tree.usage.clones for tree in trees.values()) > 0
        assert not caplog.messages

    plain = evaluation(tmp_path / "plain", None)
    assert plain.wait(300) == 0, plain.stdout.read()
    with serving(port):
        anyio.run(main)
        run = evaluation(tmp_path / "server", port)
        journal = tmp_path / "server" / "e" / "journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            assert run.poll() is None, run.stdout.read()
            time.sleep(0.02)
    assert run.poll() is None, "the evaluation waits for the server to come back"
    (tmp_path / "nano.jinja").write_text(NANO)
    with serving(port, "--chat-template", str(tmp_path / "nano.jinja"), *NATIVE):
        caplog.clear()
        anyio.run(with_messages, caplog)
        assert run.wait(300) == 0, run.stdout.read()
    assert outcomes(tmp_path / "server") == outcomes(tmp_path / "plain")
    kept = json.loads((tmp_path / "server" / "e" / "results.json").read_text())
    assert len(outcomes(tmp_path / "server")) == 40 * 3 and any(r["record"] == "point" for r in kept)
