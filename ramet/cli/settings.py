"""`ramet config`: the settings of a run, with what they take and what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from ramet.errors import ConfigError
from ramet.runs.settings import RunConfig, dumps
from ramet.schema import Settings, takes
from ramet.storage import write_json
from ramet.terminal import Table, console


def show_settings(config: RunConfig, section: str, toml: bool, out: Path | None) -> None:
    """Those whose names begin with `section`. Raises `ConfigError` if there are none."""
    values = config.model_dump(mode="json")
    begins = section and section.rstrip(".") + "."
    found = {name: schema for name, schema in Settings(RunConfig).of(values) if f"{name}.".startswith(begins)}
    if not found:
        raise ConfigError(f"no setting begins with {section!r}; there are {', '.join(RunConfig.model_fields)}")
    rows = [(name, _value(values, name), takes(schema)) for name, schema in found.items()]
    if out is not None:
        write_json(out, [{"record": "setting", "name": name, "value": value, "takes": taken} for name, value, taken in rows])
    if toml:
        console.print(Text(dumps(config)), soft_wrap=True, end="")
        return
    table = Table("setting", "value", "takes")
    for name, value, taken in rows:
        table.add_row(name, "" if value is None else str(value), taken)
    console.print(table)
    about = {"": RunConfig}.get(section) or RunConfig.model_fields[section.partition(".")[0]].annotation
    if about is not None and about.__doc__ and hasattr(about, "model_fields"):
        console.print(Text(about.__doc__.strip()))


def _value(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values
