"""What the settings of a model take, in words: for the errors of `ramet.runs.settings` and for the list that `ramet config` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

Schema = Mapping[str, Any]
_NUMBERS = {"integer": "a whole number", "number": "a number"}
_PLAIN = {"string": "text", "boolean": "true or false", "null": "nothing"}


class Settings:
    """The settings of a pydantic model and of the models in it, by dotted name."""

    def __init__(self, kind: type[BaseModel]):
        self._root = kind.model_json_schema()

    def __iter__(self) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of everything that holds a value."""
        return self._below("", self._root)

    def _below(self, prefix: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
        for name, under in schema["properties"].items():
            found = self._resolved(under)
            if "properties" in found:
                yield from self._below(f"{prefix}{name}.", found)
            else:
                yield prefix + name, found

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._root["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def at(self, where: Sequence[str | int]) -> tuple[str, Schema]:
        """(name, schema) of the place that pydantic names; what it adds to tell the cases of a type apart is left out."""
        schema, known = self._root, []
        for step in where:
            if step in schema.get("properties", ()):
                schema = schema["properties"][step]
            elif isinstance(step, int) and schema.get("type") == "array":
                schema = schema["items"] if "items" in schema else schema["prefixItems"][step]
            elif isinstance(step, str) and isinstance(schema.get("additionalProperties"), Mapping):
                schema = schema["additionalProperties"]
            else:
                break
            known.append(step)
            schema = self._resolved(schema)
        return ".".join(map(str, known)), schema


def takes(schema: Schema, example: Any = None) -> str:
    """The values that are allowed, such as "a whole number from 1 on"."""
    if "anyOf" in schema:
        return " or ".join(takes(case, example) for case in schema["anyOf"] if case.get("type") != "null")
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kind = schema.get("type", "")
    if kind in _NUMBERS:
        return _NUMBERS[kind] + _range(schema)
    if kind == "array":
        written = f"a list in brackets, such as {list(example)[:3]}" if example else "a list in brackets"
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        many = takes(inner).removeprefix("a ").replace("number", "numbers", 1)
        return f"{written}, of " + (f"{schema['maxItems']} " if "maxItems" in schema else "") + many
    if "properties" in schema:
        return f"a section, with {', '.join(schema['properties'])}"
    if kind == "object":
        return "a table in braces, such as {name = value}"
    return _PLAIN.get(kind, "another value")


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    words = [
        *([f"from {low} on"] if low is not None else []),
        *([f"above {above}"] if above is not None else []),
        *([f"of at most {high}"] if high is not None else []),
        *([f"below {below}"] if below is not None else []),
    ]
    return f" {' and '.join(words)}" if words else ""
