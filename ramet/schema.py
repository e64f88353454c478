"""What the settings of a model take, in words: for the errors of `ramet.runs.settings` and for what `ramet config` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

Schema = Mapping[str, Any]
_NUMBERS = {"integer": "a whole number", "number": "a number"}
_PLAIN = {"string": "text", "boolean": "true or false", "null": "nothing"}


class Section(BaseModel):
    """A section of settings: an unknown key is refused, and the docstring below a field is its meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Settings:
    """The settings of a pydantic model and of the models in it, by dotted name."""

    def __init__(self, kind: type[BaseModel]):
        self._root = kind.model_json_schema()

    def of(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of everything that holds a value in `values`, which say the case of a section that has several."""
        return self._below("", self._root, values)

    def sections(self) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of the settings of no section, of every section, and of each case of one that has several."""
        yield "", self._root
        for name, under in self._root["properties"].items():
            found = self._resolved(under)
            if _tag(found):
                cases = {schema["title"]: schema for schema in (self._case(found, tag) for tag in found["discriminator"]["mapping"])}
                yield from ((name, case) for case in cases.values())
            elif "properties" in found:
                yield name, found

    def values(self, section: Schema) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of what holds a value in one of the `sections`."""
        for name, under in section["properties"].items():
            found = self._resolved(under)
            if "properties" not in found and not _tag(found):
                yield name, found

    def _below(self, prefix: str, schema: Schema, values: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
        for name, under in schema["properties"].items():
            found = self._resolved(under)
            if tag := _tag(found):
                yield f"{prefix}{name}.{tag}", _tags(found)
                options = self._below(f"{prefix}{name}.", self._case(found, values[name][tag]), values[name])
                yield from ((key, option) for key, option in options if key != f"{prefix}{name}.{tag}")
            elif "properties" in found:
                yield from self._below(f"{prefix}{name}.", found, values[name])
            else:
                yield prefix + name, found

    def _case(self, schema: Schema, tag: str) -> Schema:
        return self._resolved({"$ref": schema["discriminator"]["mapping"][tag]})

    def _property(self, schema: Schema, step: str | int) -> Schema | None:
        """Of a section, or of the first of its cases that has it."""
        if step == _tag(schema):
            return _tags(schema)
        cases = [self._case(schema, tag) for tag in schema["discriminator"]["mapping"]] if _tag(schema) else [schema]
        return next((case["properties"][step] for case in cases if step in case.get("properties", ())), None)

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._root["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def at(self, where: Sequence[str | int]) -> tuple[str, Schema]:
        """(name, schema) of the place that pydantic names; what it adds to tell the cases of a type apart is left out."""
        schema: Schema = self._root
        known: list[str | int] = []
        for step in where:
            if step in schema.get("discriminator", {}).get("mapping", ()):
                schema = self._case(schema, str(step))
                continue
            if (own := self._property(schema, step)) is not None:
                schema = own
            elif isinstance(step, int) and schema.get("type") == "array":
                schema = schema["items"] if "items" in schema else schema["prefixItems"][step]
            elif isinstance(step, str) and isinstance(schema.get("additionalProperties"), Mapping):
                schema = schema["additionalProperties"]
            else:
                break
            known.append(step)
            schema = self._resolved(schema)
        return ".".join(map(str, known)), schema


def _tag(schema: Schema) -> str:
    """The key that says which case of a section it is; empty where there are no cases."""
    return str(schema.get("discriminator", {}).get("propertyName", ""))


def _tags(schema: Schema) -> Schema:
    return {"enum": list(schema["discriminator"]["mapping"])}


def takes(schema: Schema) -> str:
    """The values that are allowed, such as "a whole number from 1 on"."""
    if "anyOf" in schema:
        return " or ".join(takes(case) for case in schema["anyOf"] if case.get("type") != "null")
    if tag := _tag(schema):
        return f"a section, with {tag} ({takes(_tags(schema))}) and its options"
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kind = schema.get("type", "")
    if kind in _NUMBERS:
        return _NUMBERS[kind] + _range(schema)
    if kind == "array":
        example = schema.get("default")
        written = f"a list in brackets, such as {example[:3]}" if example else "a list in brackets"
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
