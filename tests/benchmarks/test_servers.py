"""Whole measurements through a server that plays its part: what may change on resume, and what the run folder shows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ramet
from ramet.agents.protocol import tool_schema
from ramet.cli.main import app
from ramet.env.arithmetic import rows_task
from ramet.errors import ConfigError, PolicyError
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.tokenizer import load_tokenizer
from ramet.runs.settings import RunConfig, load
from tests.policy.raw_server import says, serve, stream, usage

GOOD = stream(says("Answer: "), says("42"), says("", "stop"), usage(4))


def written(folder: Path) -> str:
    """All that the files below a folder say."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join((gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode() for path in files)
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


def test_a_server_that_goes_past_a_grant_fails_that_task_and_not_the_run(tmp_path):
    def answer(body, connection, asked):
        past = usage(body["max_tokens"] + 1) if len(asked) == 2 else usage(4)
        connection.sendall(stream(says("Answer: 42", "stop"), past))

    with serve(answer) as (url, asked):
        measure(tmp_path, f"url={url}", "server.concurrency=1")
    assert len(asked) == 4
    records = json.loads((tmp_path / "served" / "results.json").read_text())
    assert any("does not keep to max_tokens" in str(record) for record in records)
    # The whole tree can be read, without the server, with what went wrong.
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "served"), "--failed", "--json", str(tmp_path / "failed.json")])
    (failed,) = json.loads((tmp_path / "failed.json").read_text())[1:]
    assert shown.exit_code == 0 and "does not keep to max_tokens" in failed["failed"] and failed["place"]["policy"] == "base"
    with serve(stream(says("Answer: 42", "stop"), usage(999))) as (url, _), pytest.raises(PolicyError, match="does not keep"):
        measure(tmp_path / "all", f"url={url}")


def test_the_settings_of_a_server_reach_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TEAM_KEY", "hunter22")
    with serve(GOOD) as (url, asked):
        renamed = "server.names={max_tokens='max_completion_tokens', seed=''}"
        names = (renamed, "server.extra_body={effort='low'}", "server.fold_system=true", "server.headers={x-team='red', x-key='$TEAM_KEY'}")
        measure(tmp_path, f"url={url}", *names)
    assert all((body["headers"]["x-team"], body["headers"]["x-key"]) == ("red", "hunter22") for body in asked)
    assert "hunter22" not in written(tmp_path)
    with pytest.raises(ConfigError, match=r"headers\.x-key is written to the run folder"):
        measure(tmp_path, f"url={url}", "server.headers={x-key='hunter22'}")
    assert asked and all("seed" not in body and "max_tokens" not in body and body["effort"] == "low" for body in asked)
    assert all(message["role"] != "system" for body in asked for message in body["messages"])


@pytest.mark.parametrize("address", ["http://u:hunter22@h/v1", "http://h/v1?key=hunter22", "http://h/v1?x=1&api_token=hunter22"])
def test_an_address_with_a_secret_is_not_written_down(address, tmp_path):
    with pytest.raises(ConfigError, match="url holds a key or a user") as caught:
        measure(tmp_path, f"url={address}")
    assert "hunter22" not in str(caught.value)
    assert "hunter22" not in written(tmp_path)
    load(RunConfig, "nano", ["backend=chat", "url=http://h/openai/deployments/x?api-version=2024-10-21"])


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["run", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return " ".join(done.output.split())


def test_a_chat_server_answers_any_question_and_is_graded_on_sums(tmp_path):
    with serve(GOOD) as (url, asked):
        said = run("--url", url, "What is six times seven?", "--json", str(tmp_path / "tree.json"), "--journal", str(tmp_path / "kept"))
        assert "answer 42 bill" in said and asked[0]["model"] == "m"
        assert "six times seven" in asked[0]["messages"][-1]["content"] and "Answer:" in asked[0]["messages"][-1]["content"]
        (record,) = [r for r in json.loads((tmp_path / "tree.json").read_text()) if r["record"] == "tree"]
        assert record["answer"] == "42" and record["correct"] is None and record["generated"] == 4
        again = run("--url", url, "What is six times seven?", "--journal", str(tmp_path / "kept"))
        assert "answer 42 bill" in again and len(asked) == 1, "the sample is taken from the journal"
        assert "answer 42 (right)" in run("--url", url, "40+2", "--policy", "other", "--depth", "0") and asked[1]["model"] == "other"
        assert "answer 42 (wrong: it is 43)" in run("--url", url, "40+3")


def test_a_server_with_the_responses_endpoint_answers_any_question():
    text = {"type": "response.output_text.delta", "delta": "Answer: 42"}
    with serve(stream(text, {"type": "response.completed", "response": {"status": "completed"}})) as (url, asked):
        assert "answer 42 bill" in run("--url", url, "--backend", "responses", "What is six times seven?")
        assert ramet.Agent(url=url, backend="responses").run_sync("What is six times seven?").answer == "42"
    assert [body["path"] for body in asked] == ["/v1/responses"] * 2 and "six times seven" in asked[0]["input"][-1]["content"]


def test_a_completions_server_takes_the_nano_model_s_tokens():
    _, chat = load_tokenizer(BASE)
    ids = chat.turn("42")
    answer = stream({"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}, "finish_reason": "stop"}]})
    with serve(answer) as (url, asked):
        said = run("--url", url, "--backend", "completions", "--policy", "nano", "40+2")
    question = chat.render(rows_task([40, 2], "run").messages, [tool_schema()])[:-2]  # what may be spent is said before the turn ends
    assert "answer 42 (right)" in said and asked[0]["prompt"][: len(question)] == question


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "chat"], "url and a backend that is a server"),
        (["--backend", "vllm", "--url", "http://h/v1"], "url and a backend that is a server"),
        (["--backend", "completions", "--url", "http://h/v1"], "give the directory of its model"),
        (["--url", "http://h/v1", "--attention", "spava"], "goes with the backend transformers"),
        (["--url", "http://h/v1", "--budget", "0"], "give --budget at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        run("3+4", *words)
    assert len(str(caught.value).splitlines()) == 1
