"""Typed answers: what a branch is to answer with, as a pydantic type, and reading it from what it wrote."""

from __future__ import annotations

import json
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from ramet.agents.answers import extract_answer, json_values
from ramet.agents.protocol import explain
from ramet.errors import AnswerError, TaskError


class AnswerType:
    """A pydantic model, or any type that pydantic validates, that a branch's answer has to fit.

    Raises `TaskError` for what is no such type.
    """

    def __init__(self, kind: Any):
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
            schema = self._adapter.json_schema()
        except (PydanticUserError, NameError, TypeError) as error:
            name = getattr(kind, "__name__", repr(kind))
            raise TaskError(f"answers cannot be of the type {name}: give a pydantic model or a type that it can describe") from error
        self.instruction = f"End with `Answer: ` and JSON that fits this schema: {json.dumps(schema, ensure_ascii=False)}"

    def read(self, text: str, finished: bool = True) -> tuple[Any, str]:
        """The value that a turn states and its text, which for text is the value itself and else JSON.

        Of the places where an answer may stand, the first that fits counts. Raises `AnswerError`, with a line for the model, if none does.
        """
        stated = extract_answer(text, finished)
        candidates = [*([] if stated is None else [stated]), *json_values(text)]
        if not candidates:
            raise AnswerError("no answer was stated")
        problems = []
        for candidate in candidates:
            try:
                return self._from_text(candidate)
            except ValidationError as error:
                problems.append(error)
        raise AnswerError(f"the answer does not fit: {explain(problems[0])}")

    def check(self, value: Any) -> tuple[Any, str]:
        """The same for a value that a program states, as it is or as text. Raises `AnswerError`."""
        try:
            return self._from_text(value) if isinstance(value, str) else self._whole(self._adapter.validate_python(value))
        except ValidationError as error:
            raise AnswerError(f"the answer does not fit: {explain(error)}") from None

    def _from_text(self, text: str) -> tuple[Any, str]:
        try:
            return self._whole(self._adapter.validate_json(text))
        except ValidationError as as_json:
            try:
                return self._whole(self._adapter.validate_python(text))
            except ValidationError as as_text:
                raise (as_json if text.lstrip().startswith(("{", "[")) else as_text) from None

    def _whole(self, value: Any) -> tuple[Any, str]:
        return value, value if isinstance(value, str) else self._adapter.dump_json(value).decode()
