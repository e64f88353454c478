"""ChatFormat: messages to token ids, once.

The initial prompt of a branch is rendered once. After that only ids are appended: what the model
sampled, then what `after_turn` returns. Nothing that was sampled is ever encoded again, so the ids
that are trained are the ids that were sampled.

All message content is untrusted: `encode_text` encodes it such that no control token of the
tokenizer can appear, whatever the text spells.

Three formats: `ControlTokenFormat` (the nano model: one control token for each thing), `ChatMLFormat`
(Qwen, SmolLM2, Hermes) and `TemplateFormat` (any Hugging Face chat template that is sound by prefix
difference). None imports a tokenizer library; they take the tokenizer object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ramet.agents.protocol import tool_schema
from ramet.agents.tree import Message, Segment
from ramet.errors import ChatFormatError


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One sampled turn, read: its visible text, the raw JSON of its calls, and what is malformed."""

    text: str
    calls: tuple[str, ...] = ()
    error: str = ""


See = Callable[[Segment], Sequence[int]]


def blind(segment: Segment) -> Sequence[int]:
    """For formats of models without vision."""
    raise ChatFormatError(f"the task has a video ({segment.file}), and this model has no vision here; choose one that has")


class ChatFormat(Protocol):
    """How a model's conversations are spelled in token ids."""

    stop_ids: frozenset[int]
    """Ids that end a turn."""
    see: See
    """The placeholder ids of a video; formats of models without vision refuse."""

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        """A branch's prompt, up to and including the opening of the first assistant turn."""

    def after_turn(self, text: str, closed: bool) -> list[int]:
        """Ids to append after a sampled turn: its end if it is not `closed`, a tool message, the next opening."""

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read one sampled turn."""

    def text(self, ids: Sequence[int]) -> str:
        """A view for people."""


class TextEncoder:
    """Encodes untrusted text with one tokenizer, never to a control token."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added: dict[str, int] = dict(tokenizer.get_added_vocab())
        for token in tokenizer.all_special_tokens:
            added[token] = tokenizer.convert_tokens_to_ids(token)
        self.control_ids = frozenset(added.values())
        literals = sorted((literal for literal in added if len(literal) > 1), key=len, reverse=True)
        self._literal = re.compile("|".join(map(re.escape, literals))) if literals else None

    def __call__(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        ids = self._encode(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        # An added token was spelled. Cutting each spelling after its first character keeps it text.
        pieces, start = [], 0
        if self._literal is not None:
            for match in self._literal.finditer(text):
                pieces.append(text[start : match.start() + 1])
                start = match.start() + 1
        pieces.append(text[start:])
        ids = []
        for piece in pieces:
            encoded = self._encode(piece)
            if not self.control_ids.isdisjoint(encoded):
                encoded = [i for character in piece for i in self._encode(character)]
            ids += encoded
        if not self.control_ids.isdisjoint(ids):
            raise ChatFormatError("this tokenizer turns plain text into control tokens; it cannot be used safely")
        return ids

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def _token_id(tokenizer: Any, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(index) != token:
        raise ChatFormatError(f"the tokenizer has no token {token!r}; choose another chat format")
    return int(index)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _parse_marked(tokenizer: Any, sampled: Sequence[int], stop: frozenset[int], opening: int, closing: int) -> ParsedTurn:
    """Calls between two control ids. Text that merely spells the markers is text."""
    body = list(sampled)
    while body and body[-1] in stop:
        body.pop()
    text: list[str] = []
    calls: list[str] = []
    start = 0
    while (at := _index(body, opening, start)) is not None:
        text.append(_decode(tokenizer, body[start:at]))
        end = _index(body, closing, at)
        if end is None:
            return ParsedTurn("".join(text), tuple(calls), "the tool call is not closed")
        calls.append(_decode(tokenizer, body[at + 1 : end]).strip())
        start = end + 1
    text.append(_decode(tokenizer, body[start:]))
    return ParsedTurn("".join(text), tuple(calls))


def _index(ids: list[int], wanted: int, start: int) -> int | None:
    try:
        return ids.index(wanted, start)
    except ValueError:
        return None


class _Content:
    """The content of a message as ids: its videos, then its text."""

    _encode: TextEncoder
    see: See = staticmethod(blind)

    def _content(self, message: Message) -> list[int]:
        return [*(i for segment in message.media for i in self.see(segment)), *self._encode(message.content)]


class ControlTokenFormat(_Content):
    """The nano model's format: every piece of structure is one control token.

    `<|begin|>`, then `<|tools|>` if the branch may spawn, then messages `<|role|>content<|end|>`.
    There is no system role: such messages are left out.
    """

    CONTROL = ("<|pad|>", "<|begin|>", "<|end|>", "<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>", "<tool_call>", "</tool_call>")

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._id = {token: _token_id(tokenizer, token) for token in self.CONTROL}
        self.stop_ids = frozenset({self._id["<|end|>"]})

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        ids = [self._id["<|begin|>"]]
        if tools:
            ids.append(self._id["<|tools|>"])
        for message in messages:
            if message.role != "system":
                ids += [self._id[f"<|{message.role}|>"], *self._content(message), self._id["<|end|>"]]
        return [*ids, self._id["<|assistant|>"]]

    def after_turn(self, text: str, closed: bool) -> list[int]:
        end = [] if closed else [self._id["<|end|>"]]
        return [*end, self._id["<|tool|>"], *self._encode(text), self._id["<|end|>"], self._id["<|assistant|>"]]

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The ids of a well-formed assistant turn, for demonstrations and scripted policies."""
        ids = self._encode(text)
        if call is not None:
            ids += [self._id["<tool_call>"], *self._encode(call), self._id["</tool_call>"]]
        return [*ids, self._id["<|end|>"]]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        return _parse_marked(self._tokenizer, sampled, self.stop_ids, self._id["<tool_call>"], self._id["</tool_call>"])

    def text(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, ids)


class ChatMLFormat(_Content):
    """`<|im_start|>role ... <|im_end|>` with Hermes tool calls.

    Where the tokenizer has `<tool_call>` as one token (Qwen) only that token opens a call; where it
    does not, the tag spelled in the model's own newest turn does.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._start = _token_id(tokenizer, "<|im_start|>")
        self._end = _token_id(tokenizer, "<|im_end|>")
        self._newline = self._encode("\n")
        stops = {self._end}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)
        added = tokenizer.get_added_vocab()
        self._markers = (added["<tool_call>"], added["</tool_call>"]) if "<tool_call>" in added and "</tool_call>" in added else None

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        ids: list[int] = []
        if tools:
            system = "\n\n".join(message.content for message in messages if message.role == "system")
            messages = [m for m in messages if m.role != "system"]
            ids += [
                *self._opening("system"),
                *self._encode(system + "\n\n" if system else ""),
                *self._trusted(tool_preamble()),
                *self._closing(),
            ]
        for message in messages:
            ids += self._opening(message.role) + self._content(message) + self._closing()
        return ids + self._opening("assistant")

    def after_turn(self, text: str, closed: bool) -> list[int]:
        end = [] if closed else [self._end]
        response = [*self._trusted("<tool_response>\n"), *self._encode(text), *self._trusted("\n</tool_response>")]
        return [*end, *self._newline, *self._opening("user"), *response, *self._closing(), *self._opening("assistant")]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        if self._markers is not None:
            return _parse_marked(self._tokenizer, sampled, self.stop_ids, *self._markers)
        return parse_spelled(_decode(self._tokenizer, [i for i in sampled if i not in self.stop_ids]))

    def text(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, ids)

    def _trusted(self, text: str) -> list[int]:
        """Our own text, in which tags that the tokenizer knows are those tokens: what the model is to copy."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _opening(self, role: str) -> list[int]:
        return [self._start, *self._encode(role + "\n")]

    def _closing(self) -> list[int]:
        return [self._end, *self._newline]


def tool_preamble() -> str:
    """How the tool is described to models whose format has no place of its own for it."""
    return (
        "You have one tool. Its JSON schema:\n<tools>\n"
        + json.dumps(tool_schema())
        + "\n</tools>\nTo call it, write\n<tool_call>\n"
        + '{"name": "spawn_clone", "arguments": {"objectives": ["..."]}}\n</tool_call>\n'
        + "and end your turn. When you know the result, end with a line `Answer: ...`."
    )


def parse_spelled(text: str) -> ParsedTurn:
    """Calls between spelled tags, for tokenizers that have no token for them."""
    visible: list[str] = []
    calls: list[str] = []
    start = 0
    while (at := text.find("<tool_call>", start)) >= 0:
        visible.append(text[start:at])
        end = text.find("</tool_call>", at)
        if end < 0:
            return ParsedTurn("".join(visible), tuple(calls), "the tool call is not closed")
        calls.append(text[at + len("<tool_call>") : end].strip())
        start = end + len("</tool_call>")
    visible.append(text[start:])
    return ParsedTurn("".join(visible), tuple(calls))


def with_arguments(call: str) -> str:
    """A call whose arguments are called `parameters`, as Llama has it, with their usual name; anything else as it is."""
    try:
        data = json.loads(call)
    except (ValueError, RecursionError):
        return call.strip()
    if isinstance(data, dict) and "parameters" in data and "arguments" not in data:
        data["arguments"] = data.pop("parameters")
        data.pop("type", None)
        return json.dumps(data)
    return call.strip()


def _is_call(text: str) -> bool:
    """Is the whole turn a JSON object that names a function?"""
    try:
        data = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "name" in data and ("parameters" in data or "arguments" in data)


def mistral_calls(text: str) -> tuple[str, ...]:
    """What follows `[TOOL_CALLS]`: a list of calls. What is no list is one call, which its reader will find fault with."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return (text.strip(),)
    return tuple(json.dumps(call) for call in data) if isinstance(data, list) and data else (text.strip(),)


class TemplateFormat(_Content):
    """Any Hugging Face chat template, by prefix difference.

    The template is rendered with placeholders where content goes; the text around them is encoded
    as the template means it, the content as untrusted text. A template is refused unless adding
    messages leaves the rendering of the earlier ones unchanged, over two tool rounds: otherwise
    ids that were sampled would not be the ids that the template stands for.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ChatFormatError("the tokenizer has no chat template; choose a chat format by name")
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._tool_role = "tool"
        try:
            self._render([Message("user", "u"), Message("assistant", "a"), Message("tool", "t")], False)
        except Exception:  # jinja raises its own classes; a template without a tool role is common
            self._tool_role = "user"
        self._system_role = True
        try:
            self._system_role = _slot(0) in self._render([Message("system", _slot(0)), Message("user", _slot(1))], False)
        except Exception:  # likewise for one without a system role
            self._system_role = False
        self._stop_text, self._suffix = self._derive_suffix()
        ids = self._encode_template(self._stop_text)
        if not ids or ids[0] not in self._encode.control_ids:
            raise ChatFormatError(f"the template ends a turn with {self._stop_text!r}, which is not a control token")
        self._end = ids
        stops = {ids[0]}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        if not self._system_role:
            messages = _fold_system(messages)
        slots = [Message(m.role, _slot(i)) for i, m in enumerate(messages)]
        text = self._render(slots, tools, generate=True)
        ids: list[int] = []
        for i, message in enumerate(messages):
            before, found, text = text.partition(_slot(i))
            if not found:
                raise ChatFormatError(f"the template leaves out the {message.role} message")
            ids += self._encode_template(before) + self._content(message)
        return ids + self._encode_template(text)

    def after_turn(self, text: str, closed: bool) -> list[int]:
        before, _, after = self._suffix.partition(_slot(2))
        end = self._end[1:] if closed else self._end
        return [*end, *self._encode_template(before), *self._encode(text), *self._encode_template(after)]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Calls as this tokenizer's model spells them: between tags, after `[TOOL_CALLS]` (Mistral), or as a turn that is JSON (Llama)."""
        added = self._tokenizer.get_added_vocab()
        if "<tool_call>" in added and "</tool_call>" in added:
            return _parse_marked(self._tokenizer, sampled, self.stop_ids, added["<tool_call>"], added["</tool_call>"])
        body = [i for i in sampled if i not in self.stop_ids]
        if "[TOOL_CALLS]" in added:
            at = _index(body, added["[TOOL_CALLS]"], 0)
            text = _decode(self._tokenizer, body if at is None else body[:at])
            return ParsedTurn(text) if at is None else ParsedTurn(text, mistral_calls(_decode(self._tokenizer, body[at + 1 :])))
        if "<|python_tag|>" in added:
            marked = bool(body) and body[0] == added["<|python_tag|>"]
            text = _decode(self._tokenizer, body[1:] if marked else body)
            return ParsedTurn("", (with_arguments(text),)) if marked or _is_call(text) else ParsedTurn(text)
        return parse_spelled(_decode(self._tokenizer, body))

    def text(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, ids)

    def _render(self, messages: Sequence[Message], tools: bool, generate: bool = False) -> str:
        chat = [{"role": self._tool_role if m.role == "tool" else m.role, "content": m.content} for m in messages]
        text = self._tokenizer.apply_chat_template(
            chat, tools=[tool_schema()] if tools else None, add_generation_prompt=generate, tokenize=False
        )
        return str(text)

    def _encode_template(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids

    def _derive_suffix(self) -> tuple[str, str]:
        """What the template puts between an assistant turn and the next: (its end, the rest)."""
        user, said, tool = Message("user", _slot(0)), Message("assistant", _slot(1)), Message("tool", _slot(2))
        said2, tool2 = Message("assistant", _slot(3)), Message("tool", _slot(4))
        first = self._render([user], False, generate=True)
        alone = self._render([user, said], False)
        one = self._render([user, said, tool], False, generate=True)
        two = self._render([user, said, tool, said2, tool2], False, generate=True)
        if not one.startswith(first + _slot(1)) or not alone.startswith(first + _slot(1)):
            raise ChatFormatError("the chat template rewrites earlier turns when messages are added; token-in, token-out is unsound")
        tail = one[len(first + _slot(1)) :]
        if not two.startswith(one + _slot(3)) or two[len(one + _slot(3)) :] != tail.replace(_slot(2), _slot(4)):
            raise ChatFormatError("the chat template treats later tool rounds differently; token-in, token-out is unsound")
        end = alone[len(first + _slot(1)) :]
        if not end or not tail.startswith(end) or _slot(2) not in tail:
            raise ChatFormatError("the chat template does not end an assistant turn before the tool message")
        return end, tail[len(end) :]


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """System messages put at the head of the first other one, for templates that have no system role."""
    system = [m.content for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    return [replace(rest[0], content="\n\n".join([*system, rest[0].content])), *rest[1:]] if system and rest else rest


def _slot(index: int) -> str:
    return f"SLOT{index}OF0RAMET"


def chat_format(name: str, tokenizer: Any) -> ChatFormat:
    """The format called `name`; "auto" takes the tokenizer's own control tokens, else its template."""
    formats: dict[str, Callable[[Any], ChatFormat]] = {"nano": ControlTokenFormat, "chatml": ChatMLFormat, "template": TemplateFormat}
    if name == "auto":
        added = tokenizer.get_added_vocab()
        name = "nano" if "<|tools|>" in added else "chatml" if "<|im_start|>" in added else "template"
    if name not in formats:
        raise ChatFormatError(f"no chat format {name!r}; there are auto, {', '.join(formats)}")
    return formats[name](tokenizer)
