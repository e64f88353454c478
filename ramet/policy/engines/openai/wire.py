"""A chat format with invented token ids, for servers that accept messages, not ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from ramet.agents.calls import ParsedTurn, Schemas, parse_spelled, tool_preamble
from ramet.agents.encoding import PlaceholderIds, no_vision
from ramet.agents.tree import Message

ENDING = "When you know the result, end with a line `Answer: ...`."
"""What a model is told whose server describes its tools."""
_TEXT, _CALL, _CALL_GOES_ON, _TOOLS = range(1, 5)
"""What a piece belongs to: plain text; the beginning of a tool call, or its continuation; the schemas of tools."""
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""Names and ids of calls that servers take back."""


@dataclass(frozen=True, slots=True)
class NativeCall:
    """A call as a server reports it apart from text. `arguments` should be a JSON object; a model may have written anything."""

    id: str
    name: str
    arguments: str

    def json(self) -> str:
        """The call as `ramet.agents.protocol` reads it."""
        return f'{{"name": {json.dumps(self.name)}, "arguments": {self.arguments.strip() or "{}"}}}'

    def spelled(self) -> str:
        """The call in Hermes tags. The closing tag is escaped inside its JSON."""
        return "\n<tool_call>\n" + self.json().replace("</", "<\\/") + "\n</tool_call>"

    @property
    def sound(self) -> bool:
        """Whether any server will take the call back as one of its own: its arguments are an object in strict JSON, of whole characters."""
        try:
            arguments = json.loads(self.arguments.strip() or "{}")
            json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            return False
        return isinstance(arguments, dict) and bool(_NAME.fullmatch(self.name))


@dataclass(frozen=True, slots=True)
class _Spoken:
    """What the ids of one message say. `tools` holds one JSON schema a line."""

    text: str
    calls: tuple[NativeCall, ...] = ()
    tools: str = ""

    @property
    def spelled(self) -> str:
        """All of it as text: tools described, calls in Hermes tags."""
        described = "".join(tool_preamble(self.schemas)) if self.tools else ""
        return "\n\n".join(filter(None, [self.text, described])) + "".join(call.spelled() for call in self.calls)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas of the tools."""
        return [json.loads(line) for line in self.tools.splitlines()]


class WireFormat:
    """Messages as invented ids: a few that mark roles, all others pieces of text, of tool calls or of the schemas of tools.

    The id of a piece is its bytes, read as a number, so any process can read a journal of ids. A prompt is cut into
    pieces of four characters, about one token each: limits on context and counts of prompt tokens are estimates.

    The same ids can be sent in two ways (`messages`), as servers differ: with tools, calls and results in fields of their own, or
    spelled as text in Hermes tags.
    """

    ROLES = ("system", "user", "assistant", "tool")
    END = len(ROLES)
    LONGEST = 400
    """The longest piece, in characters: JSON readers refuse numbers of many more digits."""
    placeholder_ids: PlaceholderIds = staticmethod(no_vision)

    def __init__(self) -> None:
        self.stop_ids = frozenset({self.END})

    def piece(self, text: str, kind: int = _TEXT) -> int:
        """The id of a piece of text."""
        return self.END + int.from_bytes(bytes([kind]) + text.encode("utf-8", "replace"), "big")

    def pieces(self, text: str, count: int, calls: Sequence[NativeCall] = ()) -> list[int]:
        """The text and the calls as `count` ids, the last ones of the text empty if it has fewer characters.

        They are more ids if that is too much for `count`.
        """
        called = [piece for call in calls for piece in self._call(call)]
        count = max(count - len(called), 0)
        length = max(-(-len(text) // count) if count else 0, 1)
        cut = _cut(text, length) if length <= self.LONGEST and count else []
        if text and not cut:
            cut = _cut(text, self.LONGEST)
        return [self.piece(part) for part in cut] + [self.piece("")] * (count - len(cut)) + called

    def _call(self, call: NativeCall) -> list[int]:
        first, *rest = _cut(json.dumps([call.id, call.name, call.arguments], ensure_ascii=False), self.LONGEST)
        return [self.piece(first, _CALL), *(self.piece(part, _CALL_GOES_ON) for part in rest)]

    def _read(self, ids: Sequence[int]) -> _Spoken:
        """What ids say; ids of roles are left out."""
        text: list[bytes] = []
        calls: list[list[bytes]] = []
        tools: list[bytes] = []
        for number in (i - self.END for i in ids if i > self.END):
            kind, *_ = piece = number.to_bytes((number.bit_length() + 7) // 8, "big")
            if kind == _CALL:
                calls.append([piece[1:]])
            elif kind == _CALL_GOES_ON and calls:
                calls[-1].append(piece[1:])
            elif kind == _TOOLS:
                tools.append(piece[1:])
            else:
                text.append(piece[1:])
        return _Spoken(_decoded(text), tuple(filter(None, map(_called, calls))), _decoded(tools))

    def _content(self, role: str, text: str, tools: Schemas = ()) -> list[int]:
        described = "\n".join(map(json.dumps, tools))
        pieces = [*(self.piece(part) for part in _cut(text, 4)), *(self.piece(part, _TOOLS) for part in _cut(described, 4))]
        return [self.ROLES.index(role), *pieces, self.END]

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """As `ChatFormat.render`: the ids of messages and of the start of the assistant's turn; the tools are in the system message."""
        system = "\n\n".join(m.content for m in messages if m.role == "system")
        ids = self._content("system", system, tools) if system or tools else []
        for message in messages:
            if message.role != "system":
                for segment in message.media:
                    self.placeholder_ids(segment)
                ids += self._content(message.role, message.content)
        return [*ids, self.ROLES.index("assistant")]

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """As `ChatFormat.after_turn`: the ids of a message and of the start of the next turn. `closed`: the last turn has its end."""
        return [*([] if closed else [self.END]), *self._content(role, text), self.ROLES.index("assistant")]

    def after_calls(self, replies: Sequence[str], closed: bool) -> list[int]:
        """As `ChatFormat.after_calls`: every reply is a message of its own."""
        ids = [] if closed else [self.END]
        for reply in replies:
            ids += self._content("tool", reply)
        return [*ids, self.ROLES.index("assistant")]

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The text, the call, and the end of the turn. What is no call is spelled in Hermes tags."""
        if call is not None:
            try:
                made = json.loads(call)
                native = NativeCall("", made["name"], json.dumps(made["arguments"], ensure_ascii=False))
            except (ValueError, RecursionError, TypeError, LookupError):
                native = NativeCall("", "", "")
            if native.sound:
                return [*(self.piece(part) for part in _cut(text, 4)), *self._call(native), self.END]
            text = f"{text}<tool_call>\n{call}\n</tool_call>"
        return [*(self.piece(part) for part in _cut(text, 4)), self.END]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """As `ChatFormat.parse`: the answer and the calls of a turn, native ones first, then those that the text spells."""
        spoken = self._read(sampled)
        parsed = parse_spelled(spoken.text)
        return replace(parsed, calls=(*(call.json() for call in spoken.calls), *parsed.calls))

    def text(self, ids: Sequence[int]) -> str:
        """As `ChatFormat.text`: the text of the pieces, tools described and calls in Hermes tags; ids of roles are left out."""
        starts = [0, *(at for at, i in enumerate(ids) if i < self.END), len(ids)]
        return "".join(self._read(ids[start:end]).spelled for start, end in pairwise(starts))

    def tools(self, prompt: Sequence[int]) -> list[dict[str, Any]]:
        """The schemas of the tools that a prompt offers."""
        return self._read(prompt[: prompt.index(self.END)]).schemas if prompt and prompt[0] == self.ROLES.index("system") else []

    def messages(self, ids: Sequence[int], fold_system: bool = False, native: bool = False) -> list[dict[str, Any]]:
        """The messages that ids encode, as chat servers take them.

        `native`: tools are sent apart. Calls are then `tool_calls` of the assistant's message, and each is answered by a message of
        the role "tool". Otherwise, and for calls that no server would take back, they are text in Hermes tags, answered by a message of
        the user: not all servers accept the role "tool".

        An assistant turn without text or calls, such as one of reasoning alone, is left out, and the messages around it are joined.
        `fold_system` puts the system message at the start of the first user message.
        """
        writer = _Messages(native)
        turns = list(self._turns(ids))
        while turns:
            role, spoken = turns.pop(0)
            replies = []
            while role in ("assistant", "tool") and turns and turns[0][0] == "tool":
                replies.append(turns.pop(0)[1].text)
            if role == "system":
                writer.system(spoken)
            elif role == "assistant":
                writer.assistant(spoken, replies)
            elif role == "tool":
                writer.replied([spoken.text, *replies])
            else:
                writer.add(role, spoken.text)
        messages = writer.messages
        if fold_system and len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            messages[:2] = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}]
        return messages

    def _turns(self, ids: Sequence[int]) -> Iterator[tuple[str, _Spoken]]:
        starts = [at for at, i in enumerate(ids) if i < self.END]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield self.ROLES[ids[start]], self._read(ids[start + 1 : end])


class _Messages:
    """The messages of a conversation, as they are written one after another."""

    def __init__(self, native: bool):
        self._native = native
        self._joined = False
        self._ids: set[str] = set()
        self.messages: list[dict[str, Any]] = []

    def add(self, role: str, content: str) -> None:
        """A message of text; one after a turn that was left out is joined to the one before it."""
        if self._joined and self.messages and self.messages[-1]["role"] == role:
            self.messages[-1]["content"] += f"\n\n{content}"
            return
        self.messages.append({"role": role, "content": content})
        self._joined = False

    def system(self, spoken: _Spoken) -> None:
        """The system message: with the tools, unless they are sent apart."""
        text = "\n\n".join(filter(None, [spoken.text, ENDING])) if self._native and spoken.tools else spoken.spelled
        self.add("system", text)

    def assistant(self, spoken: _Spoken, replies: Sequence[str]) -> None:
        """A turn, and what its calls were answered: in call order, one for each or, if there are fewer, the last for all others."""
        sound = [call.sound and self._native and bool(replies) for call in spoken.calls]
        text = spoken.text + "".join(call.spelled() for call, native in zip(spoken.calls, sound, strict=True) if not native)
        if not any(sound):
            if text.strip():
                self.add("assistant", text)
            else:
                self._joined = True
            self.replied(replies)
            return
        self._joined = False
        given = [replies[min(number, len(replies) - 1)] for number in range(len(spoken.calls))]
        made = [(self._id(call), call, reply) for call, native, reply in zip(spoken.calls, sound, given, strict=True) if native]
        calls = [
            {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments.strip() or "{}"}}
            for name, call, _ in made
        ]
        self.messages.append({"role": "assistant", "content": text if text.strip() else None, "tool_calls": calls})
        self.messages += [{"role": "tool", "tool_call_id": name, "content": reply} for name, _, reply in made]
        others = [reply for native, reply in zip(sound, given, strict=True) if not native and len(replies) > 1]
        self.replied([*others, *replies[len(given) :]])

    def replied(self, replies: Sequence[str]) -> None:
        """Replies to calls that stand in text."""
        if replies:
            self.add("user", "<tool_response>\n" + "\n".join(replies) + "\n</tool_response>")

    def _id(self, call: NativeCall) -> str:
        """The call's own id, or one made for it if it has none that a server takes, or not one of its own."""
        name, number = call.id, len(self._ids)
        while not _NAME.fullmatch(name) or name in self._ids:
            name, number = f"call{number:05d}", number + 1
        self._ids.add(name)
        return name


def _cut(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


def _called(parts: Sequence[bytes]) -> NativeCall | None:
    """The call in these pieces; None if its end is missing."""
    try:
        return NativeCall(*json.loads(_decoded(parts)))
    except ValueError:
        return None


def _decoded(parts: Sequence[bytes]) -> str:
    return b"".join(parts).decode("utf-8", "replace")
