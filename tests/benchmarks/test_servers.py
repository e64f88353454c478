"""Whole measurements through a server that plays its part: what may change on resume, and what the run folder shows."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ramet.cli.main import app
from ramet.errors import ConfigError
from ramet.runs.settings import RunConfig, load
from tests.policy.raw_server import says, serve, stream, usage

GOOD = stream(says("Answer: "), says("42"), says("", "stop"), usage(4))
SMALL = ("eval.tasks=2", "eval.budgets=[64]", "eval.ood_budgets=[64]", "backend=chat")


def measure(runs, *settings: str) -> None:
    arguments = ["eval", "--policy", "m", "--runs", str(runs), "--name", "served"]
    done = CliRunner().invoke(app, [*arguments, *(word for setting in (*SMALL, *settings) for word in ("--set", setting))])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


def test_a_run_goes_on_at_another_address_and_more_patiently(tmp_path):
    with serve(GOOD) as (url, asked):
        measure(tmp_path, f"url={url}")
        assert len(asked) == 4
    with serve(GOOD) as (url, asked):
        measure(tmp_path, f"url={url}", "server.concurrency=1", "server.timeout=7", "server.startup_timeout=1")
        assert not asked, "nothing is asked twice"
        assert load(RunConfig, tmp_path / "served" / "config.toml").url == url
        with pytest.raises(ConfigError, match="another configuration"):
            measure(tmp_path, f"url={url}", "server.model=other")


def test_the_settings_of_a_server_reach_it(tmp_path):
    with serve(GOOD) as (url, asked):
        renamed = "server.names={max_tokens='max_completion_tokens', seed=''}"
        names = (renamed, "server.extra_body={effort='low'}", "server.fold_system=true")
        measure(tmp_path, f"url={url}", *names)
    assert asked and all("seed" not in body and "max_tokens" not in body and body["effort"] == "low" for body in asked)
    assert all(message["role"] != "system" for body in asked for message in body["messages"])


@pytest.mark.parametrize("address", ["http://u:hunter22@h/v1", "http://h/v1?key=hunter22", "http://h/v1?x=1&api_token=hunter22"])
def test_an_address_with_a_secret_is_not_written_down(address, tmp_path):
    with pytest.raises(ConfigError, match="url holds a key or a user") as caught:
        measure(tmp_path, f"url={address}")
    assert "hunter22" not in str(caught.value)
    assert not any("hunter22" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    load(RunConfig, None, ["backend=chat", "url=http://h/openai/deployments/x?api-version=2024-10-21"])
