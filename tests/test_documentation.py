"""What a newcomer reads first works as it stands: commands, Python, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from ramet.cli.main import app
from ramet.cli.settings import sections

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if code_blocks(page) and page.name != "cluster.md"], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(page):
    """What is promised stands behind a print, or in comments at the end. (Of cluster.md it is twenty updates of another trainer.)"""
    for block in code_blocks(page):
        promised = re.findall(r"print\(.*\)  # (.*)", block) or re.findall(r"^# (.*)$", block, re.M)
        assert run("-c", block).strip().splitlines() == promised


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_imports_what_it_uses_and_what_exists(page):
    for block in code_blocks(page):
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "-"]
        checked = subprocess.run(ruff, input=block, capture_output=True, text=True, timeout=120)
        assert checked.returncode == 0, checked.stdout
        for module, names in re.findall(r"^from (ramet[\w.]*) import (.*)$", block, re.M):
            assert all(hasattr(import_module(module), name) for name in names.split(", ")), (module, names)


def test_the_first_command_of_the_readme_prints_a_right_answer_by_delegation():
    expression, answer = re.findall(r'ramet run --policy nano "(.*?)".*?\((\d+)\)', (ROOT / "README.md").read_text())[0]
    shown = run("-m", "ramet", "run", "--policy", "nano", expression)
    assert f"answer {answer} (right)" in shown and "clone 1" in shown


def test_each_question_of_a_newcomer_has_one_page_with_code_that_is_run():
    listed = (ROOT / "docs" / "getting-started.md").read_text().partition("## How do I ...?")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*\?) \| \[.*\]\((.*\.md)\) \|$", listed, re.M)
    pages = [page for _, page in rows]
    assert len(rows) == len(re.findall(r"^\| .*\.md", listed, re.M)) and len(set(pages)) == len(pages)
    assert {path.name for path in (ROOT / "docs").glob("your-own-*.md")} <= set(pages)
    assert [page for page in pages if not code_blocks(ROOT / "docs" / page)] == []


def test_the_readme_is_short_and_names_the_test_command():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 800 and "make test" in readme


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = page.parent / name if name else page
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target


def command_lines(page: Path) -> list[list[str]]:
    """Every command of ramet that a page shows, in code blocks and in spans, as words from `ramet` on."""
    text = page.read_text().replace("\\\n", "")
    shown = re.findall(r"^    (.*)$", text, re.M) + [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = [re.search(r"(?:^|[\s/])(ramet(?:\.cli\.main)? .*)", line) for line in shown]
    return [shlex.split(match[1], comments=True) for match in found if match]


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}


def every_option(command: Any) -> set[str]:
    return options_of(command).union(*(every_option(below) for below in getattr(command, "commands", {}).values()))


def check_exists(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and not words[0].startswith("-") and (commands := getattr(command, "commands", None)):
        assert words[0] in commands, words
        command = commands[words.pop(0)]
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= options_of(command), (command.name, given - options_of(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist_with_the_options_that_it_gives_them(page):
    for _, *words in command_lines(page):
        check_exists(words)


def every_help(command: Any) -> list[str]:
    return [command.help or "", *(text for below in getattr(command, "commands", {}).values() for text in every_help(below))]


def test_the_commands_in_help_texts_and_examples_exist_with_the_options_that_they_are_given():
    helps = [" ".join(part.split()) for text in every_help(typer.main.get_command(app)) for part in re.split(r"\n\s*\n", text)]
    shown = re.findall(r"Example: ramet (.*)$", "\n".join(helps), re.M)
    comments = [re.findall(r"^#.*?ramet ([^`\n]*)", path.read_text(), re.M) for path in (ROOT / "examples").glob("*.toml")]
    assert shown and all(comments)
    for line in [*shown, *(line for lines in comments for line in lines)]:
        check_exists(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_that_a_page_names_by_itself_is_one_of_some_command(page):
    named = set(re.findall(r"`(--[a-z][a-z-]*)[^`]*`", page.read_text()))
    assert named <= every_option(typer.main.get_command(app)), named - every_option(typer.main.get_command(app))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_settings_that_a_page_names_exist(page):
    known = {setting.name for _, _, settings in sections() for setting in settings}
    tables = "|".join({name.split(".")[0] for name in known if "." in name and ".NAME." not in name})
    named = set(re.findall(rf"(?<![\w./-])(?:{tables})\.[a-z_]+(?=[`\s=),\]])", page.read_text()))
    named = {name for name in named if not name.endswith((".md", ".json", ".jsonl", ".toml", ".py", ".png", ".html"))}
    assert named <= known, named - known
    assigned = set(re.findall(r"(?:`|--set '?)([a-z_.]{2,}) ?= ?[\w\"\[{.]", page.read_text())) - {"key.sub"}
    assert assigned <= known | {name.rpartition(".")[2] for name in known}, assigned - known


def is_module(name: str) -> bool:
    return (ROOT / name.replace(".", "/")).is_dir() or (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?<![\w/.-])((?:ramet|tests|examples)/[\w./-]+)", text):
        assert (ROOT / name.rstrip(".")).exists(), name
    for name in re.findall(r"[` ](ramet(?:\.\w+)+)", text):
        within, _, member = name.rpartition(".")
        assert is_module(name) or (is_module(within) and hasattr(import_module(within), member)), name


def test_every_kind_of_record_has_its_line_in_the_page_of_records():
    written = {name for path in (ROOT / "ramet").rglob("*.py") for name in re.findall(r'"record": "(\w+)"', path.read_text())}
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "records.md").read_text(), re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name != "record"]
    assert sorted(listed) == sorted(written - {"meta"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_prose_of_a_page_is_at_most_120_columns_wide(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_classes_and_functions_that_a_page_names_occur_in_the_code(page):
    sources = [*(ROOT / "ramet").rglob("*.py"), *(ROOT / "tests").rglob("test_*.py")]
    code = {word for path in sources if path != Path(__file__) for word in re.findall(r"\w+", path.read_text())}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    named = {name for span in spans for name in re.findall(r"\b(?:[A-Z][a-z]+(?:[A-Z][a-z]*)+|[a-z_]+(?=\())", span)}
    assert named <= code, named - code


def test_every_paper_that_code_or_docs_cite_is_among_the_references():
    sources = [*PAGES, *(ROOT / "ramet").rglob("*.py")]
    cited = {paper for path in sources for paper in re.findall(r"(?i)arxiv[:\s]+(\d{4}\.\d{5})", path.read_text())}
    listed = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "docs" / "references.md").read_text()))
    assert cited <= listed, cited - listed


def test_every_page_can_be_reached_from_the_front_page():
    reached, ahead = set(), {ROOT / "README.md"}
    while ahead:
        page = ahead.pop()
        reached.add(page)
        linked = {(page.parent / name).resolve() for name in re.findall(r"\]\(([\w/.-]+\.md)", page.read_text())}
        ahead |= {page for page in linked if page in PAGES} - reached
    assert reached == set(PAGES)
