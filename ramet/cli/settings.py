"""`ramet config`: the settings of a run and where each comes from, and the reference of all settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ramet.errors import ConfigError
from ramet.runs.presets import describe_preset, preset_names
from ramet.runs.settings import RunConfig, dumps, traced
from ramet.schema import Schema, Settings, takes
from ramet.storage import write_json
from ramet.terminal import Table, show

INTRODUCTION = """\
# Settings

What can be set for a run, and what does each setting mean?

A run is described by a preset (`--config NAME`; `ramet config presets` lists them) or by a TOML file (`--config FILE`);
`--set key.sub=value` overrides a key of it. The defaults below are neutral ones for a language model. A preset states
everything that its recipe relies on, and is a good file to start from: `ramet config show NAME --toml > FILE`. This
page is the output of `ramet config reference --markdown`. `ramet config show NAME_OR_FILE` prints the settings that a
run would have, and where each value comes from.
"""


def show_settings(source: str, overrides: Sequence[str], section: str, toml: bool, out: Path | None) -> None:
    """Print the settings of a run whose names begin with `section`. Raises `ConfigError` if there are none."""
    config, origins = traced(source, overrides)
    values = config.model_dump(mode="json")
    rows = [(name, _value(values, name), origin) for name, origin in origins.items() if _begins(name, section)]
    if not rows:
        raise ConfigError(f"no setting begins with {section!r}; there are {', '.join(RunConfig.model_fields)}")
    if out is not None:
        write_json(out, [{"record": "setting", "name": name, "value": value, "from": origin} for name, value, origin in rows])
    if toml:
        show(Text(dumps(config)), soft_wrap=True, end="")
        return
    table = Table("setting", "value", "from")
    for name, value, origin in rows:
        table.add_row(name, written(value), origin)
    show(table)


def print_presets(out: Path | None) -> None:
    """Print the name of every preset, and what it is for."""
    presets = {name: describe_preset(name) for name in preset_names()}
    if out is not None:
        write_json(out, [{"record": "preset", "name": name, "about": line} for name, line in presets.items()])
    table = Table("preset", "what it is for")
    for name, line in presets.items():
        table.add_row(name, line)
    show(table)


def _begins(name: str, section: str) -> bool:
    """Whether a setting is in a section, given as whole parts of its dotted name."""
    return not section or f"{name}.".startswith(section.rstrip(".") + ".")


def _value(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


def written(value: Any) -> str:
    """A value as it is written in a TOML file; empty for None, which cannot be written there."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {written(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class ReferenceEntry:
    """One line of the reference. `kinds` holds the environments that the setting belongs to; it is empty outside `[env]`."""

    name: str
    kinds: tuple[str, ...]
    takes: str
    default: str
    meaning: str


def sections() -> Iterator[tuple[str, str, list[ReferenceEntry]]]:
    """(title, description, settings) of every section, in the order of a file."""
    schemas = Settings(RunConfig)
    for name, schema in schemas.sections():
        kinds = _kinds(schema["properties"]["kind"]) if name == "env" else ()
        title = f"[{name}] kind = {', '.join(kinds)}" if kinds else f"[{name}]" if name else "At the top"
        rows = [
            ReferenceEntry(
                f"{name}.{key}" if name else key, kinds, takes(below),
                "required" if key in schema.get("required", ()) else written(below.get("default")) or _absent(name),
                " ".join(below.get("description", "").split()),
            )
            for key, below in schemas.values(schema)
        ]  # fmt: skip
        yield title, schema["description"], rows


def _kinds(schema: Schema) -> tuple[str, ...]:
    return (schema["const"],) if "const" in schema else tuple(schema["enum"])


def _absent(section: str) -> str:
    return '"unlimited"' if section == "budget" else ""


def print_reference(section: str, markdown: bool, out: Path | None) -> None:
    """Print every setting whose name begins with `section`. Raises `ConfigError` if there are none."""
    selected = [(title, about, chosen) for title, about, rows in sections() if (chosen := [r for r in rows if _begins(r.name, section)])]
    if not selected:
        raise ConfigError(f"no setting begins with {section!r}; there are {', '.join(RunConfig.model_fields)}")
    if out is not None:
        write_json(out, [{"record": "setting", **asdict(row)} for _, _, rows in selected for row in rows])
    if markdown:
        show(Text(page()), soft_wrap=True, end="")
        return
    for title, about, rows in selected:
        table = Table("setting", "takes", "default", "meaning", title=title, caption=about)
        for row in rows:
            table.add_row(row.name, row.takes, row.default, row.meaning)
        show(table)


def page() -> str:
    """The whole reference as a Markdown page."""
    parts = [INTRODUCTION]
    for title, about, rows in sections():
        cells = [("key", "takes", "default", "meaning"), ("---",) * 4]
        cells += [(f"`{row.name}`", row.takes, f"`{row.default}`" if row.default else "", row.meaning) for row in rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)
        heading = f"`{title}`" if title.startswith("[") else title
        parts.append(f"## {heading}\n\n{about}\n\n{table}\n")
    return "\n".join(parts)
