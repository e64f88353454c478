"""A package of somebody else's in a working directory of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ramet.cli.main import app

PACKAGE = Path(__file__).with_name("someones_package.py")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory; the package in it is `someones.package`."""
    (tmp_path / "someones").mkdir()
    (tmp_path / "someones" / "__init__.py").touch()
    (tmp_path / "someones" / "package.py").write_text(PACKAGE.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "someones"]:
        del sys.modules[name]


@pytest.fixture
def ramet() -> Callable[..., str]:
    """Runs a command in this process and gives what it prints; raises what ends it."""

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return run
