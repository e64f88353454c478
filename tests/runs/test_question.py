"""`ramet run` for anything: documents, tools, servers of tools, roles and programs, budgets by name; interrupted and resumed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ramet.errors import ConfigError, RametError
from ramet.runs.documents import read_documents
from ramet.runs.question import question_settings
from tests.policy.raw_server import says, serve, stream, usage
from tests.policy.test_openai_responses import delta, ended, message

Ramet = Callable[..., str]
GOOD = stream(says("Answer: "), says("42"), says("", "stop"), usage(4))
ADDER = "roles.adder={system='Add.', description='adds up'}"


def shown(text: str) -> str:
    return " ".join(text.split())


def records(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads(path.read_text()):
        found.setdefault(record["record"], []).append(record)
    return found


def test_a_tool_a_role_and_a_program_work_in_one_tree_and_are_billed(here: Path, ramet: Ramet) -> None:
    words = ["run", "3+4-2+7-9+5+8-1", "--tool", "someones.package:count", "--program", "someones.package:half", "--set", ADDER]
    words += ["--journal", "kept", "--json", "r.json"]
    first = shown(ramet(*words))
    assert 'count {"text": "one row"} → 1' in first and "clone 0 as adder" in first and "tokens generated as adder" in first
    (tree,), (tool,) = (records(here / "r.json")[kind] for kind in ("tree", "tool"))
    assert tree["reference"] == 15 and tree["tool_calls"] == tool["cost"] == 2 and tree["clones"] == 1
    assert tool["tool"] == "count" and tool["calls"] == 1
    again = shown(ramet(*words))
    assert first.partition("bill")[0] in again and (here / "calls").read_text() == "+"
    (here / "someones" / "__init__.py").write_text("CHANGED = True")
    with pytest.raises(RametError, match="belongs to another configuration"):
        ramet(*words)


def test_a_settings_file_holds_what_options_add_to(here: Path, ramet: Ramet) -> None:
    (here / "s.toml").write_text('model = "nano"\nbudgets = [50, 90]\nprogram = "someones.package:half"\n[env]\nkind = "rows"\n')
    said = shown(ramet("run", "1+2", "--config", "s.toml", "--tool", "someones.package:count", "--set", ADDER, "--set", "budget.depth=1"))
    assert "│ 90 │" in said and "count" in said  # the largest of its budgets


def test_a_server_of_tools_serves_one_question(here: Path, ramet: Ramet) -> None:
    server = f"{sys.executable} {Path(__file__).parents[1] / 'tools' / 'mcp_server.py'} stdio"
    said = shown(ramet("run", "anything at all", "--mcp", server, "--program", "someones.package:served"))
    assert 'add {"a": 40, "b": 2} → {"total": 42' in said.replace('{ "total"', '{"total"') and "answer" in said
    with pytest.raises(ConfigError, match="MCP server 'false'"):
        ramet("run", "1+2", "--mcp", "false")


def test_the_page_s_package_works_as_it_is_written(here: Path, ramet: Ramet) -> None:
    page = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    code, settings = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("python", "toml"))
    (here / "mine.py").write_text(code[: code.index("roles = ")])
    (here / "mine.toml").write_text(settings)
    (question,) = re.findall(r'ramet run --config mine.toml "(.*)"', page)
    said = shown(ramet("run", "--config", "mine.toml", question))
    assert "as adder" in said and "tool calls │ 2 │ 20" in said and "answer" in said
    ramet("eval", "--config", "mine.toml", "--set", "eval.tasks=1", "--set", "eval.budgets=[192]", "--set", "eval.ood_budgets=[192]")


def test_documents_are_named_to_a_root_that_may_read_them(here: Path, ramet: Ramet) -> None:
    (here / "notes").mkdir()
    for name in ("a", "b"):
        (here / "notes" / f"{name}.md").write_text(f"The text of {name}.")
    with serve(GOOD) as (url, asked):
        words = ["run", "--url", url, "--documents", "notes/a.md", "notes/b.md", "Who?"]  # as a shell expands notes/*.md
        assert "answer 42" in shown(ramet(*words, "--journal", "kept"))
        assert "answer 42" in shown(ramet("run", "--url", url, "--documents", "notes/*.md", "--journal", "kept", "Who?"))
        assert len(asked) == 1
        content = asked[0]["messages"][-1]["content"]
        assert "Who?" in content and "notes/a.md" in content and "notes/b.md" in content and "The text of" not in content
        assert {tool["function"]["name"] for tool in asked[0]["tools"]} == {"spawn_clone", "read"}
        ramet("run", "--url", url, "--documents", "notes", "--tool", "search", "--depth", "0", "Who?")
        assert {tool["function"]["name"] for tool in asked[1]["tools"]} == {"read", "search"}
        said = shown(ramet("run", "--url", url, "--documents", "notes", "--program", "map-reduce", "--json", "r.json", "Who?"))
        assert "clone 1" in said and records(here / "r.json")["tree"][0]["clones"] == 2
        assert ["The text of a." in body["messages"][-1]["content"] for body in asked[2:4]].count(True) == 1
        (here / "notes" / "a.md").write_text("Another text.")
        with pytest.raises(RametError, match="belongs to another configuration"):
            ramet(*words, "--journal", "kept")


def test_a_model_of_the_responses_endpoint_is_called_what_the_server_calls_it(ramet: Ramet) -> None:
    with serve(stream(delta("Answer: 42"), ended(message("Answer: 42")))) as (url, asked):
        assert "answer 42" in shown(ramet("run", "--url", url, "--backend", "responses", "--policy", "their-model", "Who?"))
    assert asked[0]["path"] == "/v1/responses" and asked[0]["model"] == "their-model"


def test_documents_are_files_folders_and_globs_of_text(here: Path) -> None:
    (here / "d" / "deep").mkdir(parents=True)
    (here / "d" / ".hidden").write_text("not this")
    (here / "d" / "b.txt").write_bytes("\ufeffbé".encode())
    (here / "d" / "deep" / "a.txt").write_text("a")
    assert read_documents(["d"]) == {"d/b.txt": "bé", "d/deep/a.txt": "a"}
    assert list(read_documents(["d/deep/a.txt", "d/**/*.txt", str(here / "d")])) == ["d/deep/a.txt", "d/b.txt"]
    (here / "d" / "p.pdf").write_bytes(b"%PDF-1.7\x00\xff")
    for names, said in ((["d"], "d/p.pdf is not text in UTF-8"), (["x*"], "'x*' names no file"), ([""], "names no file")):
        with pytest.raises(ConfigError, match="--documents") as caught:
            read_documents(names)
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "abc"], "--budget 'abc' is neither a number of tokens nor of the form generated=2000,seconds=60"),
        (["--budget", "generated="], "nor of the form generated=2000,seconds=60"),
        (["--budget", "generatd=4"], "unknown key 'budget.generatd'; did you mean 'generated'?"),
        (["--budget", "generated=0,seconds=3"], "a budget of zero tokens answers nothing"),
        (["--budget", "generated=9,seconds=-1"], "budget.seconds takes a number from 0 on"),
        (["--budget", "-5"], "budget.generated takes a whole number from 0 on"),
        (["--tool", "search"], "give --documents"),
        (["--tool", "nowhere_at_all:x"], "tools: there is no module 'nowhere_at_all'"),
        (["--program", "half"], "program: 'half' is neither of the form package.module:function nor one of always"),
        (["--policy", "nowhere"], "there is no model 'nowhere'"),
        (["--documents", "*.nothing"], "'*.nothing' names no file"),
        (["--program", "someones.package:fails"], "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_meant_is_one_line(here: Path, ramet: Ramet, words: list[str], said: str) -> None:
    with pytest.raises(RametError) as caught:
        ramet("run", "1+2", *words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_limits_have_names_and_a_preset_s_largest_budget_is_the_default() -> None:
    budget = question_settings(None, [], "generated=2000, seconds=60,context=unlimited,tool_calls=3", {"budget.depth": 2}).budget
    assert (budget.generated, budget.seconds, budget.context, budget.tool_calls, budget.depth) == (2000, 60, None, 3, 2)
    plain = question_settings(None, [], None, {}).budget
    assert (plain.generated, plain.depth, plain.context) == (256, 1, None)  # the context is the model's
    assert question_settings("nano", [], None, {}).budget.generated == 384
    assert question_settings("nano", [], "50", {}).budget.generated == 50
    assert question_settings("nano", ["budget.generated=60"], None, {}).budget.generated == 60
    assert question_settings(None, ["budget.generated=60"], "generated=unlimited", {}).budget.generated is None
