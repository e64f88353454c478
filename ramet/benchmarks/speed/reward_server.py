"""`ramet bench reward-server`: many clients of one reward server, compared with direct calls; every score is checked."""

from __future__ import annotations

import random
import secrets
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from ramet.errors import RewardError
from ramet.policy.models.catalogue import find
from ramet.rewards.video.discriminative import VideoAnswer, VideoDRM
from ramet.rewards.video.questions import load_questions
from ramet.rewards.video.server import RemoteReward, RewardService
from ramet.storage import meta, write_json
from ramet.terminal import show


def bench_server(model: str, source: str, videos: Path | None, clients: int, repeats: int, seed: int, out: Path | None) -> None:
    """Every client asks for its own questions, all choices of one in a request.

    Raises `RewardError` for an answer that is not the model's.
    """
    root = videos or Path(source).parent
    questions = [question for question in load_questions(source, None, root) if question.choices]
    requests = [[VideoAnswer(q.shown, q.question, f"Answer: {c}") for c in q.choices] for q in questions]
    random.Random(seed).shuffle(requests)
    direct, served = VideoDRM.load(find(model)), VideoDRM.load(find(model))
    everything = [item for group in requests for item in group]
    for drm in (direct, served):
        drm.score(everything)  # decodes every video once
    expected = [direct.score(group) for group in requests]
    rates: dict[str, list[float]] = {"direct": [], "served": []}
    calls = 0
    for _ in range(repeats):
        direct.forget()
        rates["direct"].append(len(everything) / _seconds(partial(direct.score, everything)))
        served.forget()
        seconds, calls = _served(RewardService(served, root, secrets.token_urlsafe(24)), root, requests, expected, clients)
        rates["served"].append(len(everything) / seconds)
    share = [a / b for a, b in zip(rates["served"], rates["direct"], strict=True)]
    record: dict[str, Any] = {
        "record": "reward_server", "clients": clients, "requests": len(requests), "items": len(everything), "calls": calls,
        "repeats": repeats,
        "items_per_second": statistics.median(rates["served"]), "items_per_second_direct": statistics.median(rates["direct"]),
        "share": statistics.median(share), "share_min": min(share), "share_max": max(share),
    }  # fmt: skip
    if out is not None:
        write_json(out, [meta("bench reward-server", seed), record])
    show(
        f"{clients} clients, {len(requests)} requests of {len(everything)} items: every answer is the model's own. "
        f"{record['items_per_second']:,.0f} items a second in {calls} calls of the model, {record['items_per_second_direct']:,.0f} by one "
        f"direct call: {record['share']:.0%} ({min(share):.0%} to {max(share):.0%})"
    )


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _served(
    service: RewardService, root: Path, requests: Sequence[Sequence[VideoAnswer]], expected: Sequence[Sequence[float]], clients: int
) -> tuple[float, int]:
    """Seconds until all clients have their answers, and calls of the model."""
    url, server, thread = _start(service)

    def request_scores(first: int) -> None:
        client = RemoteReward(url, service.token, root)
        for n in range(first, len(requests), clients):
            if max(abs(a - b) for a, b in zip(client.score(requests[n]), expected[n], strict=True)) > 1e-3:
                raise RewardError(f"the server's answer to {requests[n][0].question!r} is not the model's")

    with ThreadPoolExecutor(clients) as pool:
        seconds = _seconds(lambda: list(pool.map(request_scores, range(clients))))
    server.should_exit = True
    thread.join(20)
    return seconds, service.calls


def _start(service: RewardService) -> tuple[str, uvicorn.Server, threading.Thread]:
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{bound.getsockname()[1]}", server, thread
