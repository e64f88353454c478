"""Errors are one hierarchy, and cross processes as what they are: type, text and fields."""

from __future__ import annotations

import ast
import builtins
import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ramet
from ramet import errors
from ramet.errors import KINDS, CheckpointError, PolicyError, RametError, TransientPolicyError, from_record, to_record


def below(kind: type[RametError]) -> set[type[RametError]]:
    return {kind}.union(*map(below, kind.__subclasses__()))


OURS = sorted((kind for kind in below(RametError) if kind.__module__ == errors.__name__), key=lambda kind: kind.kind)
TEXT, NUMBER = st.text(), st.floats(allow_nan=False, allow_infinity=False)
PARAMETERS: dict[type[RametError], tuple[st.SearchStrategy[Any], ...]] = {
    errors.BudgetExhausted: (TEXT, NUMBER, NUMBER),
    errors.Drained: (),
    errors.HTTPRefusal: (st.integers(400, 599), TEXT),
    errors.TransientPolicyError: (TEXT, st.none() | NUMBER, st.booleans()),
    errors.Interrupted: (TEXT, st.none() | NUMBER, st.booleans()),
    errors.TransientRewardError: (TEXT, NUMBER, st.none() | st.integers()),
}
"""What a constructor takes, where it is not one text."""


def made(kind: type[RametError]) -> st.SearchStrategy[RametError]:
    return st.tuples(*PARAMETERS.get(kind, (TEXT,))).map(lambda arguments: kind(*arguments))


def same(one: BaseException, other: RametError) -> bool:
    return type(one) is type(other) and str(one) == str(other) and vars(one) == vars(other)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_error_that_is_pickled_comes_back_with_its_type_text_and_fields(kind, data):
    error = data.draw(made(kind))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert same(copy.copy(error), error)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_error_that_is_written_as_json_comes_back_with_its_type_text_and_fields(kind, data):
    error = data.draw(made(kind))
    again = from_record(json.loads(json.dumps(to_record(error), allow_nan=False)))
    assert type(again) is kind and str(again) == str(error)
    assert {name: getattr(again, name) for name in vars(error)} == vars(error)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_is_and_has_a_kind_of_its_own(kind):
    assert "kind" in vars(kind) and KINDS[kind.kind] is kind and vars(kind)["__doc__"]


def test_no_other_module_defines_an_exception():
    root = Path(ramet.__file__).parent
    exceptions = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}
    exceptions |= {kind.__name__ for kind in OURS}
    elsewhere = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path != root / "errors.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).rpartition(".")[2] in exceptions for base in node.bases)
    ]
    assert not elsewhere, elsewhere


def test_notes_cross_with_an_error():
    error = TransientPolicyError("busy", 3.0)
    error.add_note("while it sampled")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["while it sampled"]
    assert to_record(error) == {"kind": "transient", "error": "busy", "fields": {"retry_after": 3.0}}


class BackendDown(PolicyError):
    """A user's own."""

    def __init__(self, host: str, port: int):
        super().__init__(f"{host}:{port} is down")
        self.host = host


def test_an_error_of_a_users_own_crosses_too_and_is_read_as_its_nearest_kind():
    error = BackendDown("box", 80)
    assert same(pickle.loads(pickle.dumps(error)), error)
    again = from_record(to_record(error))
    assert type(again) is PolicyError and str(again) == "box:80 is down" and vars(again) == {"host": "box"}


def test_a_kind_is_taken_once():
    with pytest.raises(TypeError, match="PolicyError are both of the kind 'lasting'"):
        type("Other", (RametError,), {"kind": PolicyError.kind})


def test_an_error_of_a_kind_that_is_not_known_is_said_to_be_so():
    with pytest.raises(CheckpointError, match="no error of the kind 'new', which says: out of luck"):
        from_record({"kind": "new", "error": "out of luck"})
