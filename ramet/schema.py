"""Descriptions of settings in words, for the error messages of `ramet.runs.settings` and for `ramet config`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

Schema = Mapping[str, Any]
NAMED = "package.module:name"
"""Stands in a list of cases for all that are named by an import path."""
_NUMBERS = {"integer": "a whole number", "number": "a number"}
_PLAIN = {"string": "text", "boolean": "true or false", "null": "nothing"}


class Section(BaseModel):
    """A section of settings. Unknown keys are refused, and the docstring below a field describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Settings:
    """The settings of a pydantic model and of the models nested in it, by dotted name."""

    def __init__(self, kind: type[BaseModel]):
        self._root = kind.model_json_schema()

    def of(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of every setting that holds a value. In a section with several cases, `values` determines which."""
        return self._below("", self._root, values)

    def sections(self) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of the top level, of every section, and of each case of a section that has several.

        Of a table of sections, such as `[roles.NAME]`, the name ends with NAME.
        """
        yield "", self._root
        for name, under in self._root["properties"].items():
            resolved = self._resolved(under)
            if _tag(resolved):
                cases = {schema["title"]: schema for schema in (self._case(resolved, tag) for tag in resolved["discriminator"]["mapping"])}
                yield from ((name, case) for case in cases.values())
            elif "properties" in resolved:
                yield name, resolved
            elif each := self._each(resolved):
                yield f"{name}.NAME", each

    def values(self, section: Schema) -> Iterator[tuple[str, Schema]]:
        """(name, schema) of every setting directly in one of the `sections`."""
        for name, under in section["properties"].items():
            resolved = self._resolved(under)
            if "properties" not in resolved and not _tag(resolved) and not self._each(resolved):
                yield name, resolved

    def _below(self, prefix: str, schema: Schema, values: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
        for name, under in schema["properties"].items():
            resolved = self._resolved(under)
            if tag := _tag(resolved):
                yield f"{prefix}{name}.{tag}", _tags(resolved)
                options = self._below(f"{prefix}{name}.", self._case(resolved, values[name][tag]), values[name])
                yield from ((key, option) for key, option in options if key != f"{prefix}{name}.{tag}")
            elif "properties" in resolved:
                yield from self._below(f"{prefix}{name}.", resolved, values[name])
            elif each := self._each(resolved):
                for key, section in values[name].items():
                    yield from self._below(f"{prefix}{name}.{key}.", each, section)
            else:
                yield prefix + name, resolved

    def _each(self, schema: Schema) -> Schema | None:
        """The schema of each section of a table of sections; None for all else."""
        each = self._resolved(schema["additionalProperties"]) if isinstance(schema.get("additionalProperties"), Mapping) else {}
        return each if "properties" in each else None

    def _case(self, schema: Schema, tag: str) -> Schema:
        mapping = schema["discriminator"]["mapping"]
        return self._resolved({"$ref": mapping[tag if tag in mapping else NAMED]})

    def _property(self, schema: Schema, step: str | int) -> Schema | None:
        """The schema of a key of a section, or of the first of its cases that has this key; None if there is none."""
        if step == _tag(schema):
            return _tags(schema)
        cases = [self._case(schema, tag) for tag in schema["discriminator"]["mapping"]] if _tag(schema) else [schema]
        return next((case["properties"][step] for case in cases if step in case.get("properties", ())), None)

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._root["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def at(self, where: Sequence[str | int]) -> tuple[str, Schema]:
        """(name, schema) of the location in a pydantic error, without the parts that pydantic adds to tell the cases of a union apart."""
        schema: Schema = self._root
        path: list[str | int] = []
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
            path.append(step)
            schema = self._resolved(schema)
        return ".".join(map(str, path)), schema


def _tag(schema: Schema) -> str:
    """The key that selects the case of a section; empty if the section has no cases."""
    return str(schema.get("discriminator", {}).get("propertyName", ""))


def _tags(schema: Schema) -> Schema:
    return {"enum": list(schema["discriminator"]["mapping"])}


def takes(schema: Schema) -> str:
    """The allowed values in words, such as "a whole number from 1 on"."""
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
