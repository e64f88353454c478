"""Import paths in settings: what they name, what tells versions apart, and what is said of a wrong one."""

from __future__ import annotations

import re
import sys

import pytest

from ramet.errors import ConfigError
from ramet.imports import load_object, provenance


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a package."""
    package = tmp_path / "imported_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "good.py").write_text("from imported_package import helper\nclass Holder:\n    value = helper.VALUE\n")
    (package / "helper.py").write_text("VALUE = 7\n")
    (package / "needs.py").write_text("import nothing_of_this_name\n")
    (package / "exits.py").write_text("raise SystemExit(3)\n")
    (package / "wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]


def test_a_path_names_an_object_of_the_working_directory(here):
    assert load_object("imported_package.good:Holder.value", "tools") == 7
    assert load_object("json:dumps", "tools")(1) == "1"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("imported_package.good", "is not of the form package.module:name"),
        ("../x:y", "is not of the form package.module:name"),
        ("imported_package.good:", "is not of the form package.module:name"),
        ("imported_packages.good:x", "there is no module 'imported_packages.good', installed or in this folder"),
        ("imported_package.god:x", "there is no module 'imported_package.god', installed or in this folder"),
        ("imported_package.good:Holdr", "imported_package.good has no Holdr; did you mean Holder?"),
        ("imported_package.needs:x", "imported_package.needs cannot be imported: No module named 'nothing_of_this_name'"),
        ("imported_package.exits:x", "imported_package.exits cannot be imported: SystemExit: 3"),
        ("imported_package.wrong:x", "imported_package.wrong cannot be imported: SyntaxError"),
    ],
)
def test_what_cannot_be_imported_is_one_line_that_names_the_key(here, path, said):
    with pytest.raises(ConfigError, match=f"^roles.reader.tools: .*{re.escape(said)}") as caught:
        load_object(path, "roles.reader.tools")
    assert "\n" not in str(caught.value)


def test_the_source_of_the_whole_package_tells_versions_apart(here):
    before = provenance("imported_package.good:Holder")
    assert before == provenance("imported_package.good:Holder")
    (here / "helper.py").write_text("VALUE = 8\n")
    after = provenance("imported_package.good:Holder")
    assert after != before and after["path"] == before["path"]
    assert provenance("pydantic:BaseModel")["distribution"].startswith("pydantic ")
    assert provenance("nowhere_at_all:x")["distribution"] == ""
