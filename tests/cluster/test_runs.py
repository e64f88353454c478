"""Whole runs on real Ray, DeepSpeed and vLLM: they learn, and what is killed under them costs time and nothing else.

Processes are found by the names that Ray and vLLM give them, among the descendants of a run's own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-openrlhf")

from ramet.agents.journal import read_records
from ramet.agents.transcripts import TREES, read_transcripts
from ramet.media.clips import make_long_questions
from ramet.policy.models.checkpoint import latest_checkpoint
from tests.policy.raw_server import says, serve, stream, usage

EXAMPLE = Path(__file__).parents[2] / "examples" / "nano-openrlhf.toml"
SMALL = [
    "train.tasks=6", "train.group_size=4", "train.minibatches=2", "train.checkpoint_every=2", "train.warmup=0", "threads=1",
    "eval.tasks=10", "eval.budgets=[192]", "eval.ood_budgets=[192]", "openrlhf.restarts=4",
]  # fmt: skip
SECONDS = 400


class Run:
    """`ramet train --trainer openrlhf` in the folder `where/name`."""

    def __init__(self, where: Path, *overrides: str, name: str = "r", cwd: Path | None = None) -> None:
        self.folder = where / name
        self._said = where / f"{name}.out"
        sets = [word for override in [*SMALL, *overrides] for word in ("--set", override)]
        command = [
            sys.executable, "-m", "ramet.cli.main", "train", "--trainer", "openrlhf", "--config", str(EXAMPLE),
            "--runs", str(where), "--name", name, *sets,
        ]  # fmt: skip
        with self._said.open("ab") as out:
            environment = {**os.environ, "COLUMNS": "300"}
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd)

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def updates(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line)["update"] for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Any, what: str) -> None:
        stop = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, f"the run has ended before {what}: {self._tail()}"
            assert time.monotonic() < stop, f"no {what}: {self._tail()}"
            time.sleep(0.1)

    def ends(self, status: int = 0) -> str:
        assert self.process.wait(SECONDS) == status, self._tail()
        return self.said

    def kill(self, name: str) -> int:
        """SIGKILL a process of the run. Returns its number."""
        mine = [p for p in psutil.Process(self.process.pid).children(recursive=True) if name in " ".join(_cmdline(p))]
        assert mine, f"no process {name}"
        mine[0].kill()
        return mine[0].pid

    def _tail(self) -> str:
        log = self.folder / "openrlhf.log"
        return self.said[-2000:] + (log.read_text(errors="replace")[-6000:] if log.exists() else "")


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def steps_made(folder: Path) -> int:
    """Optimiser steps that the final weights have seen, as DeepSpeed counts them."""
    state = folder / "openrlhf" / "_actor"
    tag = (state / "latest").read_text()
    found = torch.load(next((state / tag).glob("*mp_rank_00_model_states.pt")), map_location="cpu", weights_only=False)
    return int(found["global_steps"])


def test_a_run_is_stopped_and_loses_an_engine_and_a_trainer(tmp_path: Path) -> None:
    """Two trainers with sharded weights, one update ahead: stopped, started again, its engine killed, then a trainer."""
    settings = ("train.updates=8", "openrlhf.trainers=2", "openrlhf.staleness=1", "openrlhf.zero_stage=3")
    run = Run(tmp_path, *settings)
    run.until(lambda: run.updates, "first update")
    run.process.send_signal(signal.SIGTERM)
    assert "run the same command again to resume" in run.ends(143)
    stopped = len(run.updates)
    assert 0 < stopped < 8 and latest_checkpoint(run.folder / "checkpoints").name == f"step-{stopped:06d}"

    run = Run(tmp_path, *settings)
    run.until(lambda: len(run.updates) > max(stopped, 2), "update after the stop")
    run.kill("VLLM::EngineCore")
    run.until(lambda: run.said.count("beginning again from the last checkpoint") == 1, "restart after the engine died")
    run.until(lambda: run.updates and run.updates[-1] >= 4, "update after the engine died")
    run.kill("ray::TreePolicy")
    said = run.ends()
    assert said.count("beginning again from the last checkpoint") == 2
    assert run.updates == list(range(8)), "every update once, in order"
    assert steps_made(run.folder) == 8 * 2
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(m["optimizer_steps"] == 2 and m["staleness_max"] <= 1 for m in metrics)
    assert any(m["staleness"] > 0 for m in metrics), "trees were grown ahead"
    assert not list((run.folder / "rollouts").iterdir()), "what a checkpoint holds is not kept twice"
    kept = [(k.place["update"], k.place["group"], k.place["number"]) for k in read_transcripts(run.folder / TREES)]
    assert kept == [(u, g, n) for u in range(8) for g in range(6) for n in range(4)], "every tree once, in order"

    command = [sys.executable, "-m", "ramet.cli.main", "eval", "--policy", str(run.folder), "--config", str(run.folder / "config.toml")]
    measured = subprocess.run(
        [*command, "--runs", str(tmp_path), "--json", str(tmp_path / "eval.json")], capture_output=True, text=True, timeout=SECONDS
    )
    assert measured.returncode == 0, measured.stderr
    points = [r for r in json.loads((tmp_path / "eval.json").read_text()) if r["record"] == "point"]
    assert {p["policy"] for p in points} == {"trained"} and all(p["n"] == 10 for p in points)


@contextmanager
def reward_server(port: int = 0) -> Iterator[tuple[int, list[Any]]]:
    """(port, items that were asked about) of a reward server that likes long answers."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
            asked.extend(items)
            values = [min(len(item["answer"]) / 100, 1.0) for item in items]
            body = json.dumps({"scores": values, "probabilities": values}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


TOOLS = '''
import ramet


@ramet.tool(cost=2)
async def count(rows: list[str]) -> int:
    """Count some rows."""
    return len(rows)


async def program(branch):
    await branch.call("count", rows=list(branch.task.documents))
    await branch.spawn([{"objective": "sum", "context_keys": ["A"]}, {"objective": "sum", "context_keys": ["B"], "role": "served"}])
    await branch.finish()
'''


def test_a_tool_a_program_and_a_role_on_a_server_grow_the_trees_of_two_updates(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TOOLS)
    with serve(stream(says("Answer: "), says("42"), says("", "stop"), usage(4))) as (url, asked):
        run = Run(
            tmp_path, "train.updates=2", "train.tasks=2", "train.group_size=2", "train.minibatches=1",
            'tools=["mine:count"]', "tools_at=root", "program=mine:program",
            f"roles.served={{backend='chat', url='{url}', description='another model'}}",
            cwd=tmp_path,
        )  # fmt: skip
        run.ends()
    trees = [transcript.tree for transcript in read_transcripts(run.folder / TREES)]
    assert run.updates == [0, 1] and len(trees) == 2 * 2 * 2 and len(asked) >= len(trees)
    for tree in trees:
        (call,) = tree.root.turns[0].calls
        assert (call.name, call.cost) == ("count", 2) and int(call.result.text) > 1
        own, served = tree.root.turns[1].clones
        assert own.trainable and not served.trainable and served.role == "served" and served.answer == "42"


def test_a_reward_server_that_goes_away_with_a_critic(tmp_path: Path) -> None:
    """PPO with a critic on the reward of a video reward server. It goes: the run stops and keeps its trees. It is back: they are judged."""
    make_long_questions(tmp_path / "videos", 8, 0, 2)
    with reward_server() as (port, asked):
        settings = (
            "train.updates=4", "openrlhf.critic=true", "openrlhf.lam=0.95", "env.kind=longvideo", "env.metric=reward", "env.seconds=1.0",
            f"env.reward_model=http://127.0.0.1:{port}", f"env.videos={tmp_path}/videos", f"env.train={tmp_path}/videos/questions.jsonl",
            "budget.depth=0", "budgets=[24]", "budget.answer_reserve=4", "reward.concurrency=4",
            "env.reward_patience=5",
        )  # fmt: skip
        run = Run(tmp_path, *settings)
        run.until(lambda: run.updates and run.updates[-1] >= 1, "second update")
        assert asked and all("video" in item and "Answer:" in item["answer"] for item in asked)
    said = run.ends(1)
    assert "cannot be reached" in said and "reward model at" in said
    before = run.updates
    kept = {}
    for path in (run.folder / "rollouts").glob("*.jsonl"):
        # Read on under another name when the run has removed it.
        kept[path.stem] = (tmp_path / path.name, read_records(path))
        os.link(path, tmp_path / path.name)
    assert any(records for _, records in kept.values()), "the trees without a reward are kept"
    with reward_server(port):
        run = Run(tmp_path, *settings)
        run.until(lambda: len(run.updates) > len(before), "update after the server was back")
        run.ends()
    assert run.updates == list(range(4))
    for path, records in kept.values():
        whole = read_records(path)
        assert whole[: len(records)] == records and len({(r["group"], r["number"]) for r in whole}) == len(whole) == 6 * 4
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(m["critic_loss"] >= 0 for m in metrics) and steps_made(run.folder) == 4 * 2


@contextmanager
def node(*arguments: str) -> Iterator[None]:
    """A node of a Ray cluster in processes of its own, with one GPU that is not there; killed with them."""
    command = [
        str(Path(sys.executable).parent / "ray"), "start", *arguments, "--num-gpus=1", "--num-cpus=2", "--block", "--disable-usage-stats",
        f"--object-store-memory={2**28}",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        whole = psutil.Process(process.pid)
        for member in [*whole.children(recursive=True), whole]:
            member.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_node_is_lost(tmp_path: Path) -> None:
    """Two nodes, the run submitted to their job server. One dies: the run stops with its state, and goes on when there is another."""
    port, jobs = free_port(), free_port()
    settings = ("train.updates=4", f"openrlhf.address=http://127.0.0.1:{jobs}", "openrlhf.restarts=1")
    # Ray's sockets stand in it, and their paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="ray") as short,
        node("--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={jobs}", f"--temp-dir={short}"),
    ):
        answers(jobs)
        with node(f"--address=127.0.0.1:{port}"):
            run = Run(tmp_path, *settings)
            run.until(lambda: len(run.updates) > 2, "third update")
        said = run.ends(2)
        assert "beginning again" in said and "this Ray cluster has 1 GPUs where 2 are needed" in said
        assert latest_checkpoint(run.folder / "checkpoints").name == "step-000002"
        with node(f"--address=127.0.0.1:{port}"):
            Run(tmp_path, *settings).ends()
    assert run.updates == list(range(4)) and steps_made(run.folder) == 4 * 2


def answers(port: int) -> None:
    stop = time.monotonic() + 120
    while time.monotonic() < stop:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2):
            return
        time.sleep(0.5)
    raise AssertionError("the job server does not answer")
