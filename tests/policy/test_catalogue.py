"""Where models are: found by name, or missed in words that are ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramet.errors import CheckpointError
from ramet.policy.models.catalogue import cache, find


@pytest.mark.parametrize("name", ["no/such/model", "007", "nanoo", "/no/such/model"])
def test_a_model_that_is_not_there_is_called_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"there is no model '{name}'") as error:
        find(name)
    assert (str(tmp_path) in str(error.value)) == (not name.startswith("/"))


@pytest.mark.parametrize("name", ["a b", "a/b/c", "", "../x", "owner/", "a@b"])
def test_what_cannot_be_on_the_hub_is_not_asked_for(name):
    with pytest.raises(CheckpointError, match="owner/name"):
        find(f"hf:{name}")


def test_models_are_kept_where_the_user_keeps_such_things(monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("RAMET_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache() == Path("/own/models")
    monkeypatch.delenv("RAMET_CACHE")
    assert cache() == Path("/xdg/ramet/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache() == Path("/home/someone/.cache/ramet/models")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache().parts[-2:] == ("ramet", "models")
