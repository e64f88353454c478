"""What a newcomer reads first works as it stands: commands, Python, links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/runtime.md"])
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(page):
    for block in code_blocks(ROOT / page):
        (promised,) = re.findall(r"print\(.*\)  # (.*)", block)
        assert run("-c", block).strip() == promised


def test_the_first_command_of_the_readme_prints_a_right_answer_by_delegation():
    expression, answer = re.findall(r'ramet run --policy nano "(.*?)".*?\((\d+)\)', (ROOT / "README.md").read_text())[0]
    shown = run("-m", "ramet", "run", "--policy", "nano", expression)
    assert f"answer {answer} (right)" in shown and "clone 1" in shown


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
