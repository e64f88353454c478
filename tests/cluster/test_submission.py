"""Submitting a run, as Ray's own client does it, to a job server that answers as Ray's does in its first seconds."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ramet.errors import ConfigError
from ramet.runs import cluster, cluster_process

ray = pytest.importorskip("ray.job_submission", reason="Ray is not installed: make test-openrlhf")


@contextmanager
def job_server(refusals: int) -> Iterator[tuple[str, list[Any]]]:
    """(address, jobs submitted) of a server that has no agent for the first `refusals` jobs."""
    submitted: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, json.dumps({"version": "4", "ray_version": "2.55.0", "ray_commit": ""}))

        def do_POST(self) -> None:
            submitted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if len(submitted) <= refusals:
                self.answer(500, "No available agent to submit job, please try again later.")
            else:
                self.answer(200, json.dumps({"job_id": "1", "submission_id": "raysubmit_1"}))

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", submitted
    finally:
        server.shutdown()
        server.server_close()


def test_a_job_server_without_an_agent_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cluster_process, "POLL_SECONDS", 0)
    with job_server(refusals=3) as (address, submitted), caplog.at_level(logging.INFO, "ramet.runs.cluster"):
        assert cluster._submit(ray.JobSubmissionClient(address), "python -m run", address) == "raysubmit_1"
    assert [job["entrypoint"] for job in submitted] == ["python -m run"] * 4
    (line,) = (record.getMessage() for record in caplog.records)
    assert "No available agent" in line and line.endswith("waiting up to 60 seconds for it to take jobs") and "\n" not in line


def test_one_that_goes_on_refusing_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_process, "WAIT_SECONDS", 0)
    says = r"refuses the run .*No available agent.*ray status"
    with job_server(refusals=9) as (address, _), pytest.raises(ConfigError, match=says) as error:
        cluster._submit(ray.JobSubmissionClient(address), "python -m run", address)
    assert "\n" not in str(error.value)
