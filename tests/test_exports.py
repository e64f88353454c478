"""What `import ramet` offers, and what it costs."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ramet
from ramet.errors import extra
from tests.test_base_install import without_extras


def test_importing_ramet_imports_nothing_heavy():
    program = """
import sys, ramet
assert ramet.__version__ and "Runtime" in dir(ramet)
heavy = {"torch", "transformers", "numpy", "httpx", "pydantic", "anyio", "typer", "rich"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ramet.__all__)
def test_every_name_that_is_exported_is_there(name):
    assert getattr(ramet, name) is getattr(ramet, name) is not None
    assert name in dir(ramet)


def test_an_install_of_compiled_files_alone_has_every_name(tmp_path):
    source = Path(ramet.__file__).parent
    package = shutil.copytree(source, tmp_path / "ramet", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    assert compileall.compile_dir(package, quiet=1, legacy=True)
    for path in package.rglob("*.py"):
        path.unlink()
    program = "import ramet; from ramet import Runtime; print(ramet.__file__, *ramet.__all__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(package / "__init__.pyc"), *ramet.__all__]


def test_the_names_are_those_of_the_modules_that_define_them():
    from ramet import ChatPolicy, Runtime
    from ramet.agents.runtime import Runtime as defined
    from ramet.policy.engines.openai import ChatPolicy as policy

    assert Runtime is defined and ChatPolicy is policy
    assert len(ramet.__all__) == len(set(ramet.__all__)) > 20


def test_an_unknown_name_is_an_attribute_error_and_a_room_is_still_a_module():
    with pytest.raises(AttributeError, match="module 'ramet' has no attribute 'Runtme'"):
        ramet.Runtme  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Runtme'"):
        exec("from ramet import Runtme")
    from ramet import storage

    assert storage.__name__ == "ramet.storage"


def test_without_extras_the_names_that_need_none_are_there_and_the_others_say_what_they_need():
    program = """
import ramet
needed = {}
for name in ramet.__all__:
    try:
        getattr(ramet, name)
    except ModuleNotFoundError as error:
        needed[name] = str(error)
print(needed)
"""
    done = without_extras(program)
    assert done.returncode == 0, done.stderr
    needed = eval(done.stdout)
    assert needed.keys() <= {"HFPolicy", "Learner", "Trainer", "VLLMPolicy", "load_model", "mcp_tools", "python_tool"}
    brought = {name: extra({"mcp_tools": "mcp", "python_tool": "pydantic_monty"}.get(name, "torch")) for name in needed}
    assert all(brought[name] in line and name in line and "\n" not in line for name, line in needed.items())
