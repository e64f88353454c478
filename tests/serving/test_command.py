"""The command `ramet serve`: a process of its own, asked over its socket, stopped by SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from ramet.cli.main import app
from ramet.errors import RametError
from ramet.runs.serving.command import token_for
from tests.processes import child

OWN = '''
async def program(branch):
    if "1+2" in branch.task.messages[-1].content:
        return str(len(await branch.spawn(["a", "b"])))
    return await branch.finish()
'''


def test_the_nano_model_is_served_with_a_program_until_sigterm(tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ramet", "serve", "--policy", "nano", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options = ["--program", "own:program", "--budget", "generated=300,seconds=60"]
    with child([*command, *options], cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as process:
        url = f"http://127.0.0.1:{port}/v1"
        assert process.stderr.readline() == f"serving on {url}\n"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=20)
        assert [model.id for model in client.models.list()] == ["nano"]
        asked = [{"role": "user", "content": "3+4-2+7-9+5+8-1+6+2+4-3+5+1"}]
        reply = client.chat.completions.create(model="nano", messages=asked)
        assert reply.choices[0].message.content == "30" and reply.usage.ramet["clones"] > 0 and reply.usage.completion_tokens <= 300
        asked = [{"role": "user", "content": "1+2"}]
        assert client.chat.completions.create(model="nano", messages=asked).choices[0].message.content == "2"
        with pytest.raises(openai.BadRequestError, match=r"sum|expression"):
            client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "Who are you?"}])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


def test_an_address_that_others_reach_asks_for_a_token():
    assert token_for("127.0.0.1", "") == token_for("localhost", "") == token_for("::1", "") == ""
    assert token_for("127.0.0.1", "given") == "given" and len(token_for("0.0.0.0", "")) >= 16 and len(token_for("example.org", "")) >= 16


@pytest.mark.parametrize(
    ("words", "says_so"),
    [
        (["--policy", "nowhere"], "there is no model 'nowhere'"),
        (["--tool", "nowhere:f"], "there is no module 'nowhere'"),
        (["--budget", "lots"], "--budget 'lots'"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["--set", "attention.method=spava"], "is not served"),
    ],
)
def test_what_cannot_be_served_is_one_line(words, says_so):
    done = CliRunner().invoke(app, ["serve", *words])
    assert isinstance(done.exception, RametError) and says_so in str(done.exception)
