"""ChatFormat: messages to token ids, once.

The initial prompt of a branch is rendered once. After that only ids are appended: what the model
sampled, then what `after_turn` returns. Nothing that was sampled is ever encoded again, so the ids
that are trained are the ids that were sampled.

All message content is untrusted: `TextEncoder` encodes it such that no control token of the
tokenizer can appear, whatever the text spells. What stands between two control tokens is encoded
as one text, as the tokenizer does it.

Three formats: `ControlTokenFormat` (the nano model: one control token for each thing), `TemplateFormat`
(the model's own Hugging Face chat template, where it is sound by prefix difference) and `ChatMLFormat`
(for models without a template that were trained on it; chosen by name only).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import Any, Protocol

from ramet.agents.protocol import tool_schema
from ramet.agents.thoughts import said_calls, spoken
from ramet.agents.tree import Message, Segment
from ramet.errors import ChatFormatError, first_line


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


def turn_end(chat: ChatFormat) -> int:
    """The id that closes a turn as the format writes it; a model's `stop_ids` may be more."""
    return chat.after_turn("", closed=False)[0]


class TextEncoder:
    """Encodes untrusted text with one tokenizer, never to a control token.

    The text goes on from what stands before it: the mark of a space that some tokenizers put before a text does not creep in.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._continued = _without_prefix(tokenizer)
        # Runs of white space that have a token of their own (Gemma, GPT-NeoX) are text.
        added: dict[str, int] = {literal: i for literal, i in tokenizer.get_added_vocab().items() if literal.strip(" \t\r\n▁")}
        for token in tokenizer.all_special_tokens:
            added[token] = tokenizer.convert_tokens_to_ids(token)
        self.control_ids = frozenset(added.values())
        self._added = added
        self._control = _any_of(added)
        self._literal = _any_of(literal for literal in added if len(literal) > 1)
        self._after_control = self._continued if self._continued is not tokenizer and self._prefix_at_start_only() else tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._text(text, self._continued)

    def assembled(self, parts: Iterable[int | str], start: bool = False) -> list[int]:
        """Ids as they are, and texts encoded as the tokenizer encodes what stands between control tokens; `start`: of the whole prompt."""
        ids: list[int] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                ids += self._text("".join(map(str, run)), self._tokenizer if start and not ids else self._after_control)
            else:
                ids += map(int, run)
        return ids

    def trusted(self, text: str) -> list[int | str]:
        """Text of our own or of a template, for `assembled`: where it spells a control token it means the token."""
        if self._control is None:
            return [text]
        parts: list[int | str] = []
        start, strips = 0, False
        for match in self._control.finditer(text):
            index = self._added[match[0]]
            token = self._tokenizer.added_tokens_decoder.get(index)
            before = text[start : match.start()]
            before = before.lstrip() if strips else before
            parts += [before.rstrip() if token is not None and token.lstrip else before, index]
            start, strips = match.end(), token is not None and token.rstrip
        return [part for part in [*parts, text[start:].lstrip() if strips else text[start:]] if part != ""]

    def _text(self, text: str, tokenizer: Any) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        ids = self._encode(text, tokenizer)
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
            encoded = self._encode(piece, self._continued if ids else tokenizer)
            if not self.control_ids.isdisjoint(encoded):
                encoded = [i for character in piece for i in self._encode(character, self._continued)]
            ids += encoded
        if not self.control_ids.isdisjoint(ids):
            raise ChatFormatError("this tokenizer turns plain text into control tokens; it cannot be used safely")
        return ids

    def _encode(self, text: str, tokenizer: Any) -> list[int]:
        if not text:
            return []
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _prefix_at_start_only(self) -> bool:
        """Does text after a control token get no mark of a space? (`prepend_scheme="first"`; "always" puts one there too.)"""
        for literal, index in self._added.items():
            if self._tokenizer.encode(literal, add_special_tokens=False) == [index]:
                joint: list[int] = self._tokenizer.encode(literal + "a", add_special_tokens=False)
                return joint[1:] == self._encode("a", self._continued)
        return False


def _any_of(literals: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _without_prefix(tokenizer: Any) -> Any:
    """The tokenizer without the space, or its mark, that it puts before a text; itself if it puts none."""
    if not any(_prefixes(tokenizer)):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    for component, setting, off in _prefixes(changed):
        setattr(component, setting, off)
    return changed


def _prefixes(tokenizer: Any) -> Iterator[tuple[Any, str, Any]]:
    """The components of a fast tokenizer that put something before a text: (component, its setting, what turns it off)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pending = [] if backend is None else [backend.normalizer, backend.pre_tokenizer]
    while pending:
        component = pending.pop()
        if type(component).__name__ == "Sequence":
            pending += list(component)
        for setting, off in (("prepend", ""), ("prepend_scheme", "never"), ("add_prefix_space", False)):
            if getattr(component, setting, off) != off:
                yield component, setting, off


def _token_id(tokenizer: Any, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id or tokenizer.convert_ids_to_tokens(index) != token:
        raise ChatFormatError(f"the tokenizer has no token {token!r}; choose another chat format")
    return int(index)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


_OPENED, _CLOSED = "\ue000", "\ue001"
"""Stand for the two control ids around a call, in a text from which they are removed where they stand for themselves."""


def _parse_marked(tokenizer: Any, sampled: Sequence[int], stop: frozenset[int], opening: int, closing: int | None) -> ParsedTurn:
    """Calls between two control ids, or from one to the end. Text that merely spells the markers is text."""
    body = list(sampled)
    while body and body[-1] in stop:
        body.pop()
    marks = {opening: _OPENED} if closing is None else {opening: _OPENED, closing: _CLOSED}
    pieces: list[str] = []
    for is_mark, run in groupby(body, marks.__contains__):
        if is_mark:
            pieces += map(marks.__getitem__, run)
        else:
            pieces.append(_decode(tokenizer, list(run)).replace(_OPENED, "").replace(_CLOSED, ""))
    parsed = _parsed("".join(pieces), _OPENED, _CLOSED if closing is not None else "")
    said = parsed.text  # marks that are only quoted are shown as they are spelled
    for index, mark in marks.items():
        said = said.replace(mark, _decode(tokenizer, [index])) if mark in said else said
    return replace(parsed, text=said)


def _parsed(text: str, opening: str, closing: str) -> ParsedTurn:
    """What a turn says, and its calls: those that are neither thought about nor quoted. Without `closing`, a call takes the rest."""
    said, calls, cut = said_calls(spoken(text), opening, closing)
    return ParsedTurn(said, tuple(calls), "the tool call is not closed" if cut else "")


class _Content:
    """The content of a message: the ids of its videos, then its text."""

    _encode: TextEncoder
    see: See = staticmethod(blind)

    def _content(self, message: Message) -> list[int | str]:
        return [*(i for segment in message.media for i in self.see(segment)), message.content]


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
                ids += [self._id[f"<|{message.role}|>"], *self._encode.assembled(self._content(message)), self._id["<|end|>"]]
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
        stops = {self._end}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)
        added = tokenizer.get_added_vocab()
        self._markers = (added["<tool_call>"], added["</tool_call>"]) if "<tool_call>" in added and "</tool_call>" in added else None

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        parts: list[int | str] = []
        if tools:
            system = "\n\n".join(message.content for message in messages if message.role == "system")
            messages = [m for m in messages if m.role != "system"]
            parts += [*self._opening("system"), system + "\n\n" if system else "", *self._encode.trusted(tool_preamble()), *self._closing()]
        for message in messages:
            parts += [*self._opening(message.role), *self._content(message), *self._closing()]
        return self._encode.assembled([*parts, *self._opening("assistant")], start=True)

    def after_turn(self, text: str, closed: bool) -> list[int]:
        end = [] if closed else [self._end]
        response = [*self._encode.trusted("<tool_response>\n"), text, *self._encode.trusted("\n</tool_response>")]
        return self._encode.assembled(
            [*end, "\n", *self._opening("user"), *response, *self._closing(), *self._opening("assistant")],
        )

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        if self._markers is not None:
            return _parse_marked(self._tokenizer, sampled, self.stop_ids, *self._markers)
        return parse_spelled(_decode(self._tokenizer, [i for i in sampled if i not in self.stop_ids]))

    def text(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, ids)

    def _opening(self, role: str) -> list[int | str]:
        return [self._start, role + "\n"]

    def _closing(self) -> list[int | str]:
        return [self._end, "\n"]


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
    return _parsed(text, "<tool_call>", "</tool_call>")


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


TODAY = datetime(2024, 7, 26)
"""What templates that print the date are told, whatever the day: prompts are the same tomorrow."""


def _dated(template: str) -> str:
    """A template for which it is always `TODAY`: its own macro stands before the clock's `strftime_now`."""
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for letter in "aAwdbBmyYHIMSfpjUWcxXGuVFTDeR" for flag in ("-", "")]
    said = "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
    return "{% macro strftime_now(format) %}{{ format" + said + " }}{% endmacro %}{{ '' }}" + template


class TemplateFormat(_Content):
    """The model's own chat template, by prefix difference.

    The template is rendered with placeholders where content goes; the text around them is encoded
    as the template means it, the content as untrusted text, trimmed or escaped where the template does that. A template is refused
    unless adding messages leaves the rendering of the earlier ones unchanged, over two tool rounds: otherwise
    ids that were sampled would not be the ids that the template stands for.

    opened  what the template writes after the opening of a turn that is to be sampled, and leaves out of turns that are past
            (`<think>`): as a branch only grows, it stays there

    A template that ignores tools gets them described in a system message.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ChatFormatError("the tokenizer has no chat template; choose a chat format by name")
        self._tokenizer = tokenizer
        self._encode = TextEncoder(tokenizer)
        self._tool_role = "tool"
        try:
            self._render([Message("user", "u"), Message("assistant", "a"), Message("tool", "t")], False)
        except ChatFormatError:  # a template without a tool role is common
            self._tool_role = "user"
        self._system_role = True
        try:
            self._system_role = _slot(0) in self._render([Message("system", _slot(0)), Message("user", _slot(1))], False)
        except ChatFormatError:  # likewise for one without a system role
            self._system_role = False
        asked = [Message("user", "u")]
        self._describes_tools = tool_schema()["function"]["name"] in self._render(asked, True, generate=True)
        said = self._render(asked, False, generate=True)
        if self._encode.assembled(self._encode.trusted(said), start=True) != tokenizer.encode(said, add_special_tokens=False):
            raise ChatFormatError("the tokenizer does not encode its chat template section by section, as messages are encoded here")
        self.opened, end, self._between = self._derived(tools=False)
        if self._describes_tools and self._derived(tools=True) != (self.opened, end, self._between):
            raise ChatFormatError("the chat template treats tool rounds differently when there are tools; token-in, token-out is unsound")
        closing = self._encode.trusted(end)[0]
        if not isinstance(closing, int):
            raise ChatFormatError(f"the template ends a turn with {end!r}, which is not a control token")
        stops = {closing}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        if not self._system_role:
            messages = _fold_system(messages)
        shown = [Message(m.role, _padded(i)) for i, m in enumerate(messages)]
        if tools and not self._describes_tools:
            shown = _described(shown, self._system_role)
        text = self._render(shown, tools, generate=True)
        return self._encode.assembled(self._filled(text, messages), start=True)

    def after_turn(self, text: str, closed: bool) -> list[int]:
        parts = self._filled(self._between, [Message("tool", text)])
        return self._encode.assembled(parts[1:] if closed else parts)

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Calls as this tokenizer's model spells them: between tags, after `[TOOL_CALLS]` (Mistral), or as a turn that is JSON (Llama)."""
        sampled = [*self._encode.assembled(self._encode.trusted(self.opened)), *sampled]  # a thought may have begun in the prompt
        added = self._tokenizer.get_added_vocab()
        if "<tool_call>" in added and "</tool_call>" in added:
            return _parse_marked(self._tokenizer, sampled, self.stop_ids, added["<tool_call>"], added["</tool_call>"])
        body = [i for i in sampled if i not in self.stop_ids]
        if "[TOOL_CALLS]" in added:
            parsed = _parse_marked(self._tokenizer, body, self.stop_ids, added["[TOOL_CALLS]"], None)
            return replace(parsed, calls=mistral_calls("".join(parsed.calls))) if parsed.calls else parsed
        if "<|python_tag|>" in added:
            marked = bool(body) and body[0] == added["<|python_tag|>"]
            text = spoken(_decode(self._tokenizer, body[1:] if marked else body))
            return ParsedTurn("", (with_arguments(text),)) if marked or _is_call(text) else ParsedTurn(text)
        return parse_spelled(_decode(self._tokenizer, body))

    def text(self, ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, ids)

    def _render(self, messages: Sequence[Message], tools: bool, generate: bool = False) -> str:
        chat = [{"role": self._tool_role if m.role == "tool" else m.role, "content": m.content} for m in messages]
        schemas = [tool_schema()] if tools else None
        try:
            text = self._tokenizer.apply_chat_template(
                chat, schemas, chat_template=_dated(self._tokenizer.get_chat_template(tools=schemas)), add_generation_prompt=generate,
                tokenize=False,
            )  # fmt: skip
        except Exception as error:  # jinja raises its own classes, and whatever the template's expressions raise
            raise ChatFormatError(f"the model's chat template refuses these messages: {first_line(error)}") from error
        return str(text)

    def _filled(self, text: str, messages: Sequence[Message]) -> list[int | str]:
        """Rendered text with the messages' content in the place of their slots."""
        slots = list(_SLOT.finditer(text))
        missing = [m.role for i, m in enumerate(messages) if [int(slot[2]) for slot in slots].count(i) != 1]
        if missing:
            raise ChatFormatError(f"the template leaves out the {missing[0]} message, or says it twice")
        parts: list[int | str] = []
        at = 0
        for slot in slots:
            *media, content = self._content(messages[int(slot[2])])
            parts += [*self._encode.trusted(text[at : slot.start()]), *media, _as_shown(str(content), slot[1], slot[3])]
            at = slot.end()
        return [*parts, *self._encode.trusted(text[at:])]

    def _derived(self, tools: bool) -> tuple[str, str, str]:
        """(`opened`, what ends an assistant turn, what stands between the text of a turn and the next, with a slot for the tool's)."""
        user, said, tool = Message("user", _slot(1)), Message("assistant", _slot(2)), Message("tool", _padded(0))
        said2, tool2 = Message("assistant", _slot(3)), Message("tool", _padded(4))
        first = self._render([user], tools, generate=True)
        one = self._render([user, said, tool], tools, generate=True)
        two = self._render([user, said, tool, said2, tool2], tools, generate=True)
        kept, found, tail = one.partition(_slot(2))
        opened = first[len(kept) :]
        if not found or not first.startswith(kept) or not tail.endswith(opened):
            raise ChatFormatError("the chat template rewrites earlier turns when messages are added; token-in, token-out is unsound")
        if two != one.removesuffix(opened) + _slot(3) + tail.replace(_slot(0), _slot(4)):
            raise ChatFormatError("the chat template treats later tool rounds differently; token-in, token-out is unsound")
        end = self._render([user, said], tools).partition(_slot(2))[2]
        if not end or not tail.startswith(end) or _slot(0) not in tail:
            raise ChatFormatError("the chat template does not end an assistant turn before the tool message")
        return opened, end, tail


def _described(messages: list[Message], system_role: bool) -> list[Message]:
    """Rendered slots with the tool described beside the system message, or before the first."""
    first = messages[0] if messages else Message("user", "")
    if first.role == "system":
        return [replace(first, content=f"{first.content}\n\n{tool_preamble()}"), *messages[1:]]
    if system_role:
        return [Message("system", tool_preamble()), *messages]
    return [replace(first, content=f"{tool_preamble()}\n\n{first.content}"), *messages[1:]]


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """System messages put at the head of the first other one, for templates that have no system role."""
    system = [m.content for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    return [replace(rest[0], content="\n\n".join([*system, rest[0].content])), *rest[1:]] if system and rest else rest


def _slot(index: int) -> str:
    return f"SLOT{index}OF0RAMET"


def _padded(index: int) -> str:
    """A slot between tabs, which show whether the template trims or escapes what it is given."""
    return f"\t{_slot(index)}\t"


_SLOT = re.compile(r"(\t|\\t)?SLOT(\d+)OF0RAMET(\t|\\t)?")


def _as_shown(content: str, before: str | None, after: str | None) -> str:
    """`content` as a template shows what stands between the tabs of a padded slot, of which it left `before` and `after`."""
    content = content.lstrip() if before is None else content
    content = content.rstrip() if after is None else content
    return json.dumps(content, ensure_ascii=False)[1:-1] if before == after == r"\t" else content


def chat_format(name: str, tokenizer: Any) -> ChatFormat:
    """The format called `name`. "auto" takes the tokenizer's own chat template, or nano's control tokens, and guesses nothing else."""
    formats: dict[str, Callable[[Any], ChatFormat]] = {"nano": ControlTokenFormat, "chatml": ChatMLFormat, "template": TemplateFormat}
    if name != "auto":
        if name not in formats:
            raise ChatFormatError(f"no chat format {name!r}; there are auto, {', '.join(formats)}")
        return formats[name](tokenizer)
    advice = "set chat to the format that the model was trained on, such as chatml"
    if getattr(tokenizer, "chat_template", None):
        try:
            return TemplateFormat(tokenizer)
        except ChatFormatError as error:
            raise ChatFormatError(f"{error}; {advice}") from error
    if set(ControlTokenFormat.CONTROL) <= tokenizer.get_added_vocab().keys():
        return ControlTokenFormat(tokenizer)
    raise ChatFormatError(f"the tokenizer has no chat template: put the model's chat_template.jinja beside it, or {advice}")
