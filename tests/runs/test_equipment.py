"""A package of somebody else's, tools, a role and a program, through the commands: used, charged, journalled, part of what a run is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ramet.agents.programs import PROGRAMS
from ramet.errors import ConfigError
from ramet.policy.models.catalogue import BASE
from ramet.runs.build import open_engine
from ramet.runs.equipment import equipment_of, load_tools, named_equipment
from ramet.runs.settings import RunConfig, load

Ramet = Callable[..., str]
SETTINGS = '''
model = "nano"
budgets = [40]
tools = ["someones.package:count", "someones.package:plain", "read"]
tools_at = "root"
program = "someones.package:half"
[roles.adder]
model = "nano"
description = "adds up"
[budget]
tool_calls = 20
answer_reserve = 8
depth = 1
[env]
kind = "rows"
operands = [2, 5]
ood_operands = [6, 6]
[train]
updates = 2
tasks = 1
minibatches = 1
group_size = 2
checkpoint_every = 1
[eval]
tasks = 2
budgets = [40]
ood_budgets = [40]
'''


@pytest.fixture(autouse=True)
def settings(here: Path) -> None:
    """A file of settings that names what is in the package."""
    (here / "run.toml").write_text(SETTINGS)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]


def test_training_is_killed_in_a_tool_resumed_and_ends_as_if_it_had_not_been(here: Path, ramet: Ramet) -> None:
    ramet("train", "--config", "run.toml", "--name", "whole")
    made = len((here / "calls").read_text())
    assert made == 2 * 2 + 2 * 2  # a call a tree: of two updates, and of both splits
    (here / "calls").unlink()
    command = [sys.executable, "-m", "ramet", "train", "--config", "run.toml", "--name", "cut"]
    killed = subprocess.run(command, env={**os.environ, "KILLED_AT_CALL": "4"}, capture_output=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert len(curve(here / "runs" / "cut")) == 1
    ramet("train", "--config", "run.toml", "--name", "cut")
    assert curve(here / "runs" / "cut") == curve(here / "runs" / "whole")
    metrics = curve(here / "runs" / "whole")
    assert all(update["spawn_rate"] == 1 for update in metrics)


def test_a_measurement_that_is_killed_calls_no_tool_twice_that_has_answered(here: Path, ramet: Ramet) -> None:
    words = ["eval", "--config", "run.toml", "--name", "e"]
    killed = subprocess.run(
        [sys.executable, "-m", "ramet", *words], env={**os.environ, "KILLED_AT_CALL": "4"}, capture_output=True, timeout=120
    )
    assert killed.returncode == -9, killed.stderr
    ramet(*words)
    assert len((here / "calls").read_text()) == 2 * 2 + 1  # the one that was killed is made again
    package = here / "someones" / "package.py"
    package.write_text(package.read_text().replace("len(text.splitlines())", "7"))
    with pytest.raises(Exception, match=r"begun with other code of someones.package:count, .*add --accept-changed-code"):
        ramet(*words)


def test_programs_of_the_package_have_names() -> None:
    for name, program in PROGRAMS.items():
        assert named_equipment(load(RunConfig, "nano", [f"program={name}"])).program is program


def test_the_frontier_measures_the_program_beside_the_methods(here: Path, ramet: Ramet) -> None:
    texts = [["Hall", ["Hall was built by Ann."]], ["Ann", ["Ann lived in Ghent."]]]
    row = {"question": "Where did the builder of Hall live?", "answer": "Ghent", "supporting_facts": [["Hall", 0], ["Ann", 0]]}
    rows = [{"id": n, **row, "question": f"{n}? {row['question']}", "context": texts} for n in range(2)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--config", "run.toml", "--set", "env={kind='hotpotqa', data='rows.jsonl'}", "--methods", "direct,delegate", "--limit", "2"]
    ramet("frontier", "--policy", str(BASE), *words, "--name", "f", "--json", "f.json")
    points = {r["method"]: r for r in json.loads((here / "f.json").read_text()) if r["record"] == "point" and r["metric"] == "em"}
    assert set(points) == {"direct", "delegate", "program"} and points["program"]["spawn_rate"] == 1
    assert points["program"]["recall"] == 0.5 and points["direct"]["spawn_rate"] == 0
    assert len((here / "calls").read_text()) == 2  # a call each of the program's trees, and of no method's


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('tools=["someones.package:plane"]', "tools: someones.package has no plane; did you mean plain?"),
        ('tools=["serch"]', "tools: 'serch' is neither of the form package.module:function nor one of read, search, budget, "),
        ('mcp=["http://h/mcp?api_key=hunter22"]', "mcp holds a key or a user, and is written to the run folder"),
        ('tools=["someones.package:Holder"]', "tools: someones.package:Holder is neither a tool nor a function"),
        ('tools=["someones.package:number"]', "tools: someones.package:number is neither a tool nor a function"),
        ('tools=["someones.package:undocumented"]', "tools: tool undocumented has no docstring"),
        ('tools=["someones.package:count", "someones.package:count_again"]', "tools: two tools are called count"),
        ('tools=["nowhere_at_all:x"]', "tools: there is no module 'nowhere_at_all'"),
        ('roles.adder.tools=["someones.package:half"]', "roles.adder.tools: tool half has no docstring"),
        ("roles.adder.model=nowhere", "roles.adder.model: there is no model 'nowhere'"),
        ("roles.adder.trainable=true", "roles.adder: only the run's own model is trained"),
        ("roles.adder.backend=chat", "roles.adder: url and a backend that is a server"),
        ("tools_at=nobody", "tools_at takes one of everywhere, clones, root"),
        ("program=half", "program: 'half' is neither of the form package.module:function nor one of always, best-of-n, map-reduce"),
        ("program=someones.package:not_async", "program: someones.package:not_async is not an async function"),
        ("program=someones.package:Holder", "program: someones.package:Holder is not an async function"),
        ("program=someones.package:of_two", "program: someones.package:of_two cannot be called with the branch alone"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_key_and_makes_no_folder(here: Path, ramet: Ramet, setting: str, said: str) -> None:
    for command in ("train", "eval"):
        with pytest.raises(ConfigError) as caught:
            ramet(command, "--config", "run.toml", "--set", setting)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (here / "runs").exists()


def test_the_tools_of_a_server_are_there_while_a_command_runs_and_are_journalled(here: Path, ramet: Ramet) -> None:
    server = f"{sys.executable} {Path(__file__).parents[1] / 'tools' / 'mcp_server.py'} stdio"
    words = ["eval", "--config", "run.toml", "--set", "program=someones.package:served", "--set", f"mcp=[{json.dumps(server)}]"]
    ramet(*words, "--set", "eval.tasks=1", "--json", "e.json")
    assert all(r["generated"] and r["clones"] == 0 for r in json.loads((here / "e.json").read_text()) if r["record"] == "point")
    for mcp, said in (("false", "MCP server 'false' "), ("nowhere-at-all", "nowhere-at-all")):
        with pytest.raises(ConfigError, match=said) as caught:
            ramet(*words, "--set", f"mcp=['{mcp}']", "--name", mcp)
        assert "\n" not in str(caught.value)
    twice = "two tools are called add"
    with pytest.raises(ConfigError, match=twice):
        ramet(*words, "--set", f"mcp=[{json.dumps(server)}, {json.dumps(server)}]", "--name", "twice")


def test_what_is_built_in_has_a_name() -> None:
    names = ["read", "budget", "calculator", "python"]
    assert [tool.name for tool in load_tools(names, "tools")] == names


def test_roles_with_one_model_share_one_engine_and_others_are_the_run_s_own(here: Path) -> None:
    config = load(RunConfig, here / "run.toml", ["roles.second={model='nano'}", "roles.third={system='Be brief.'}"])
    roles = equipment_of(config, open_engine).roles
    assert roles["adder"].policy is roles["second"].policy is not None and not roles["adder"].trainable
    assert roles["third"].policy is None and roles["third"].trainable and named_equipment(config).roles["adder"].policy is None


@pytest.mark.parametrize(
    ("url", "sent"), [("http://a:1/other/v1", True), ("http://a:2/v1", False), ("https://a:1/v1", False), ("http://b/v1", False)]
)
def test_headers_go_to_the_host_that_they_are_for(url: str, sent: bool) -> None:
    opened: list[RunConfig] = []

    def opening(config: RunConfig, model: str) -> Any:
        opened.append(config)
        return None, None, None

    there = ["backend=chat", "url=http://a:1/v1", "server.headers={x-key='$KEY'}", f"roles.r={{backend='chat', url='{url}'}}"]
    equipment_of(load(RunConfig, "nano", there), opening)
    assert opened[0].url == url and bool(opened[0].server.headers) is sent


def test_what_tells_runs_apart(here: Path) -> None:
    def identity(*settings: str) -> Any:
        config = load(RunConfig, here / "run.toml", settings)
        return config.identity(), config.code()

    before = identity()
    assert before == identity() != identity("program=someones.package:plain")
    assert identity("roles.adder={model='m', backend='chat', url='http://a/v1'}") == identity(
        "roles.adder={model='m', backend='chat', url='http://b/v1'}"
    )
    (here / "someones" / "__init__.py").write_text("VERSION = 2")
    assert before != identity()
    plain = load(RunConfig, "nano").identity()
    assert load(RunConfig, "nano").code() == []
    assert not {"tools", "tools_at", "program", "roles", "code", "weights"} & plain.keys()  # as before there were any
