"""Sources of the settings of a run: a preset, which is a complete recipe in the package, or a TOML file."""

from __future__ import annotations

import difflib
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from ramet.errors import ConfigError
from ramet.storage import read_text

_PRESETS = files("ramet") / "presets"
_ENDING = ".toml"


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.name.removesuffix(_ENDING) for path in _PRESETS.iterdir() if path.name.endswith(_ENDING))


def describe_preset(name: str) -> str:
    """The first line of a preset, which says what it is for. Raises `ConfigError` for an unknown name."""
    return _preset(name).partition("\n")[0].removeprefix("# ")


def is_preset(source: str | Path) -> bool:
    """Whether `source` is the name of a preset: text without a slash and without a dot."""
    return isinstance(source, str) and "/" not in source and "." not in source


def source_name(source: str | Path) -> str:
    """How `ramet config show` names `source`: "preset nano", or the path of a file."""
    return f"preset {source}" if is_preset(source) else str(source)


def read_settings(source: str | Path) -> dict[str, Any]:
    """The settings of a preset (given by its name) or of a TOML file. Raises `ConfigError` if it does not exist or cannot be read."""
    if is_preset(source):
        return tomllib.loads(_preset(str(source)))
    try:
        return tomllib.loads(read_text(Path(source)))
    except OSError as error:
        raise ConfigError(f"cannot read config {source}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {source} is not valid TOML: {error}") from error


def _preset(name: str) -> str:
    """The text of a preset. Raises `ConfigError` for an unknown name."""
    known = preset_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"there is no preset {name!r}; {hint}there are {', '.join(known)}; a file is given as {name}.toml or ./{name}")
    return (_PRESETS / f"{name}{_ENDING}").read_text(encoding="utf-8")
