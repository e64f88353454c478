"""What clients ask for: bodies of `/v1/chat/completions` and `/v1/responses`, read into one form.

Fields that change nothing here, such as `user` or `reasoning_effort`, are passed over. One that a client would expect to be obeyed, and
that is not, refuses the request: nothing is ignored in silence.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ramet.agents.budget import Budget
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Message
from ramet.errors import ConfigError, HTTPRefusal
from ramet.web import first_problem

DOCUMENTS = 10_000
"""Documents of one request."""
_Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, slots=True)
class Question:
    """One request, whichever endpoint it came to.

    messages   the conversation; the last one is the user's
    documents  texts by key: the field `documents`, and files that are attached
    budget     of the tree
    usage      is the usage sent at the end of a stream?
    progress   is it told what the clones do?
    after      id of the tree that this goes on with; "" for none
    """

    messages: tuple[Message, ...]
    documents: Mapping[str, str]
    budget: Budget
    sampling: Sampling
    seed: int
    stream: bool
    usage: bool = True
    progress: bool = False
    after: str = ""


class _Part(BaseModel):
    type: str
    text: str = ""
    file: dict[str, Any] = Field(default={})
    filename: str = ""
    file_data: str = ""


class _InputMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = ""
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    documents: Annotated[dict[str, str], Field(max_length=DOCUMENTS)] = Field(default={})
    budget: _Count | dict[str, Any] | None = None
    progress: bool = False

    def limits(self, most: Budget, tokens: int | None) -> Budget:
        """The budget that is asked for, within that of the server."""
        requested = dict(self.budget) if isinstance(self.budget, dict) else {} if self.budget is None else {"generated": self.budget}
        if tokens is not None:
            requested["generated"] = min(tokens, requested.get("generated") or tokens)
        return narrowed(most, requested)

    def sampled(self, default: Sampling) -> Sampling:
        """How is sampled."""
        temperature = default.temperature if self.temperature is None else self.temperature
        return Sampling(temperature, default.top_p if self.top_p is None else self.top_p, default.top_k)


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(_Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[_InputMessage], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    max_tokens: _Count | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None

    def question(self, most: Budget, default: Sampling) -> Question:
        """The request in the one form. Raises `HTTPRefusal` for what is not done here."""
        extra = self.model_extra or {}
        if self.n not in (None, 1):
            raise HTTPRefusal(400, "n: one answer a request; send several requests")
        _refuse(extra, ("tools", "functions", "stop", "logprobs", "top_logprobs", "audio", "prediction", "logit_bias"))
        if (extra.get("response_format") or {"type": "text"}) != {"type": "text"}:
            raise HTTPRefusal(400, "response_format: only text is given here")
        messages, documents = _conversation(self.messages, self.documents)
        tokens = self.max_completion_tokens or self.max_tokens
        usage = self.stream_options is not None and self.stream_options.include_usage
        return Question(
            messages, documents, self.limits(most, tokens), self.sampled(default), self.seed or 0, self.stream, usage, self.progress
        )


class ResponsesRequest(_Common):
    """The body of `/v1/responses`."""

    input: str | Annotated[list[_InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: _Count | None = None
    previous_response_id: str | None = None

    def question(self, most: Budget, default: Sampling) -> Question:
        """The request in the one form. Raises `HTTPRefusal` for what is not done here."""
        extra = self.model_extra or {}
        _refuse(extra, ("tools", "background", "prompt", "conversation", "top_logprobs"))
        if ((extra.get("text") or {}).get("format") or {"type": "text"}) != {"type": "text"}:
            raise HTTPRefusal(400, "text.format: only text is given here")
        items = [_InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        if self.instructions:
            items = [_InputMessage(role="system", content=self.instructions), *items]
        messages, documents = _conversation(items, self.documents)
        limits, sampling = self.limits(most, self.max_output_tokens), self.sampled(default)
        after = self.previous_response_id or ""
        return Question(messages, documents, limits, sampling, self.seed or 0, self.stream, True, self.progress, after)


def _refuse(extra: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if extra.get(name):
            hint = "; tools are those that the server was started with" if name in ("tools", "functions") else ""
            raise HTTPRefusal(400, f"{name}: not taken here{hint}")


def _conversation(items: Sequence[_InputMessage], documents: Mapping[str, str]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """The messages as text, and the documents with the files that were attached."""
    if items[-1].role != "user":
        raise HTTPRefusal(400, "the last message is the user's")
    attached = dict(documents)
    messages: list[Message] = []
    for item in items:
        parts = item.content if isinstance(item.content, list) else [_Part(type="text", text=item.content or "")]
        texts = [part.text for part in parts if part.type in ("text", "input_text", "output_text")]
        for part in parts:
            if part.type in ("file", "input_file"):
                name, text = _attached(part)
                if name in attached:
                    raise HTTPRefusal(400, f"two documents are called {name[:80]!r}")
                attached[name] = text
            elif part.type not in ("text", "input_text", "output_text"):
                raise HTTPRefusal(400, f"content of the type {part.type[:40]!r} is not taken here: text and text files are")
        messages.append(Message("system" if item.role == "developer" else item.role, "\n".join(texts)))
    if len(attached) > DOCUMENTS:
        raise HTTPRefusal(400, f"at most {DOCUMENTS} documents")
    return tuple(messages), attached


def _attached(part: _Part) -> tuple[str, str]:
    """Name and text of a file: plain text, or a data URL in base64."""
    name, data = part.filename or part.file.get("filename"), part.file_data or part.file.get("file_data")
    if not isinstance(name, str) or not name or not isinstance(data, str) or not data:
        raise HTTPRefusal(400, "a file is taken with its filename and file_data; ids of uploaded files are not known here")
    head, comma, encoded = data.partition(",")
    if not (data.startswith("data:") and comma and head.endswith(";base64")):
        return name, data
    try:
        return name, base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise HTTPRefusal(400, f"the file {name[:80]!r} is not text in UTF-8; give its text, or send it in `documents`") from None


def narrowed(most: Budget, requested: Mapping[str, Any]) -> Budget:
    """The budget that is asked for, no currency of it above `most`. Raises `HTTPRefusal` for what is no budget."""
    try:
        wanted = Budget.model_validate({name: value for name, value in requested.items() if value is not None})
    except (ValidationError, ConfigError) as error:
        if isinstance(error, ValidationError):
            raise HTTPRefusal(400, f"budget.{first_problem(error)}") from None
        raise HTTPRefusal(400, f"budget: {error}") from None
    limits: dict[str, Any] = {}
    for name in Budget.model_fields:
        ours, theirs = getattr(most, name), getattr(wanted, name) if name in requested else None
        smaller = ours if theirs is None else theirs if ours is None or name == "answer_reserve" else min(ours, theirs)
        limits[name] = smaller
    if limits["generated"] is not None:
        limits["answer_reserve"] = min(limits["answer_reserve"], limits["generated"] // 8)
    return Budget(**limits)
