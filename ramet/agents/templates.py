"""TemplateFormat: the model's own Hugging Face chat template, where adding messages leaves the earlier ones unchanged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from ramet.agents.calls import (
    ParsedTurn,
    Schemas,
    is_call,
    mistral_calls,
    parse_marked,
    parse_spelled,
    spelled_call,
    tool_preamble,
    with_arguments,
)
from ramet.agents.encoding import TextEncoder, TokenizerFormat, decode
from ramet.agents.protocol import SPAWN, SPAWN_SCHEMA
from ramet.agents.thoughts import without_thoughts
from ramet.agents.tree import Message
from ramet.errors import ChatFormatError, first_line

_SPAWN_ONLY = (SPAWN_SCHEMA,)
TODAY = datetime(2024, 7, 26)
"""The date given to templates that print one. It is fixed, so that the same task has the same prompt on any day."""


def _dated(template: str) -> str:
    """The template with a macro that shadows `strftime_now`, so that the date is always `TODAY`."""
    if "strftime_now" not in template:
        return template
    codes = [f"%{flag}{letter}" for letter in "aAwdbBmyYHIMSfpjUWcxXGuVFTDeR" for flag in ("-", "")]
    replacements = "".join(f" | replace({code!r}, {TODAY.strftime(code)!r})" for code in codes)
    return "{% macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}{{ '' }}" + template


class TemplateFormat(TokenizerFormat):
    """The model's own chat template, derived from how the rendering changes as messages are added.

    The template is rendered with slots in place of the content. The text around the slots is encoded as the template means it; the
    content is encoded as untrusted text, trimmed or escaped where the template does so. A template is refused unless adding messages
    leaves the rendering of the earlier ones unchanged over two tool rounds: otherwise the ids that were sampled would not be the ids
    that the template produces.

    opened  what the template writes after the opening of the turn to be sampled but leaves out of past turns (`<think>`). As a branch
            only grows, it stays in the context

    If a template ignores tools, they are described in a system message.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ChatFormatError("the tokenizer has no chat template; choose a chat format by name")
        super().__init__(tokenizer)
        self._tool_role = "tool"
        try:
            self._render([Message("user", "u"), Message("assistant", "a"), Message("tool", "t")], ())
        except ChatFormatError:  # a template without a tool role is common
            self._tool_role = "user"
        self._system_role = True
        try:
            self._system_role = _slot(0) in self._render([Message("system", _slot(0)), Message("user", _slot(1))], ())
        except ChatFormatError:  # likewise for one without a system role
            self._system_role = False
        question = [Message("user", "u")]
        self._describes_tools = SPAWN in self._render(question, _SPAWN_ONLY, generate=True)
        prompt = self._render(question, (), generate=True)
        if self._encode.assembled(self._encode.trusted(prompt), start=True) != tokenizer.encode(prompt, add_special_tokens=False):
            raise ChatFormatError("the tokenizer does not encode its chat template section by section, as messages are encoded here")
        self.opened, end, self._between = self._derived(())
        if self._describes_tools and self._derived(_SPAWN_ONLY) != (self.opened, end, self._between):
            raise ChatFormatError("the chat template treats tool rounds differently when there are tools; token-in, token-out is unsound")
        closing = self._encode.trusted(end)[0]
        if not isinstance(closing, int):
            raise ChatFormatError(f"the template ends a turn with {end!r}, which is not a control token")
        self._turn_end = closing
        stops = {closing}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """The ids of a prompt. Raises `ChatFormatError` if the template refuses the messages, or drops or repeats one."""
        if not self._system_role:
            messages = _fold_system(messages)
        slotted = [Message(m.role, _padded(i)) for i, m in enumerate(messages)]
        tools = [defused(self._encode, tool) for tool in tools]
        if tools and not self._describes_tools:
            slotted = _described(slotted, self._system_role, "".join(tool_preamble(tools)))
        text = self._render(slotted, tools, generate=True)
        return self._encode.assembled(self._filled(text, messages), start=True)

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """What the template writes between an assistant turn and the next one, with `text` as the message of `role`.

        Raises `ChatFormatError` for a user's message if the template rewrites earlier turns when one is added.
        """
        parts = self._filled(self._between if role == "tool" else self._between_questions, [Message(role, text)])
        return self._encode.assembled(parts[1:] if closed else parts)

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read a turn whose calls are spelled as this model does: in tags, after `[TOOL_CALLS]` (Mistral), or as pure JSON (Llama)."""
        sampled = [*self._encode.assembled(self._encode.trusted(self.opened)), *sampled]  # a thought may have begun in the prompt
        added = self._tokenizer.get_added_vocab()
        if "<tool_call>" in added and "</tool_call>" in added:
            return parse_marked(self._tokenizer, sampled, self.stop_ids, added["<tool_call>"], added["</tool_call>"])
        body = [i for i in sampled if i not in self.stop_ids]
        if "[TOOL_CALLS]" in added:
            parsed = parse_marked(self._tokenizer, body, self.stop_ids, added["[TOOL_CALLS]"], None)
            return replace(parsed, calls=mistral_calls("".join(parsed.calls))) if parsed.calls else parsed
        if "<|python_tag|>" in added:
            marked = bool(body) and body[0] == added["<|python_tag|>"]
            text = without_thoughts(decode(self._tokenizer, body[1:] if marked else body))
            return ParsedTurn("", (with_arguments(text),)) if marked or is_call(text) else ParsedTurn(text)
        return parse_spelled(decode(self._tokenizer, body))

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """A whole turn with its call spelled as this model does (see `parse`)."""
        added = self._tokenizer.get_added_vocab()
        parts: list[int | str] = [text]
        if call is not None and "[TOOL_CALLS]" in added and "<tool_call>" not in added:
            parts += [added["[TOOL_CALLS]"], f"[{call}]"]
        elif call is not None and "<|python_tag|>" in added and "<tool_call>" not in added:
            parts = [call]
        elif call is not None:
            parts += spelled_call(self._encode, call)
        return self._encode.assembled([*parts, self._turn_end])

    def _render(self, messages: Sequence[Message], tools: Schemas, generate: bool = False) -> str:
        """The template's text for these messages. Raises `ChatFormatError` if the template does."""
        chat = [{"role": self._tool_role if m.role == "tool" else m.role, "content": m.content} for m in messages]
        schemas = [dict(tool) for tool in tools] or None
        try:
            text = self._tokenizer.apply_chat_template(
                chat, schemas, chat_template=_dated(self._tokenizer.get_chat_template(tools=schemas)), add_generation_prompt=generate,
                tokenize=False,
            )  # fmt: skip
        except Exception as error:  # jinja raises its own classes, and whatever the template's expressions raise
            raise ChatFormatError(f"the model's chat template refuses these messages: {first_line(error)}") from error
        return str(text)

    def _filled(self, text: str, messages: Sequence[Message]) -> list[int | str]:
        """Rendered text as parts, with each slot replaced by the content of its message."""
        slots = list(_SLOT.finditer(text))
        missing = [m.role for i, m in enumerate(messages) if [int(slot[2]) for slot in slots].count(i) != 1]
        if missing:
            raise ChatFormatError(f"the template leaves out the {missing[0]} message, or repeats it")
        parts: list[int | str] = []
        at = 0
        for slot in slots:
            *media, content = self._content(messages[int(slot[2])])
            parts += [*self._encode.trusted(text[at : slot.start()]), *media, _as_shown(str(content), slot[1], slot[3])]
            at = slot.end()
        return [*parts, *self._encode.trusted(text[at:])]

    @cached_property
    def _between_questions(self) -> str:
        """The text between an assistant turn and the next one, with a slot for a user's message."""
        return self._derived((), "user")[2]

    def _derived(self, tools: Schemas, role: Literal["tool", "user"] = "tool") -> tuple[str, str, str]:
        """(`opened`, the end of an assistant turn, the text between it and the next one, with a slot for a message of `role`)."""
        user, turn, tool = Message("user", _slot(1)), Message("assistant", _slot(2)), Message(role, _padded(0))
        turn2, tool2 = Message("assistant", _slot(3)), Message(role, _padded(4))
        first = self._render([user], tools, generate=True)
        one = self._render([user, turn, tool], tools, generate=True)
        two = self._render([user, turn, tool, turn2, tool2], tools, generate=True)
        head, slot, tail = one.partition(_slot(2))
        opened = first[len(head) :]
        if not slot or not first.startswith(head) or not tail.endswith(opened):
            raise ChatFormatError("the chat template rewrites earlier turns when messages are added; token-in, token-out is unsound")
        if two != one.removesuffix(opened) + _slot(3) + tail.replace(_slot(0), _slot(4)):
            raise ChatFormatError("the chat template treats later tool rounds differently; token-in, token-out is unsound")
        end = self._render([user, turn], tools).partition(_slot(2))[2]
        if not end or not tail.startswith(end) or _slot(0) not in tail:
            raise ChatFormatError("the chat template does not end an assistant turn before the next message")
        return opened, end, tail


def defused(encode: TextEncoder, value: Any) -> Any:
    """A tool's schema in which no text spells a control token: a template writes it as it stands, and so it would become one."""
    if isinstance(value, Mapping):
        return {encode.defused(str(key)): defused(encode, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [defused(encode, each) for each in value]
    return encode.defused(value) if isinstance(value, str) else value


def _described(messages: list[Message], system_role: bool, preamble: str) -> list[Message]:
    """Slotted messages with the tools described (`preamble`): in the system message, in a new one, or before the first message."""
    first = messages[0] if messages else Message("user", "")
    if first.role == "system":
        return [replace(first, content=f"{first.content}\n\n{preamble}"), *messages[1:]]
    if system_role:
        return [Message("system", preamble), *messages]
    return [replace(first, content=f"{preamble}\n\n{first.content}"), *messages[1:]]


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with the system messages moved to the head of the first other one, for templates without a system role."""
    system = [m.content for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    return [replace(rest[0], content="\n\n".join([*system, rest[0].content])), *rest[1:]] if system and rest else rest


def _slot(index: int) -> str:
    """The text that stands for the content of message `index` in a rendering."""
    return f"SLOT{index}OF0RAMET"


def _padded(index: int) -> str:
    """A slot between tabs, which show whether the template trims or escapes content."""
    return f"\t{_slot(index)}\t"


_SLOT = re.compile(r"(\t|\\t)?SLOT(\d+)OF0RAMET(\t|\\t)?")


def _as_shown(content: str, before: str | None, after: str | None) -> str:
    """`content` trimmed or escaped like a padded slot, of whose tabs the template left `before` and `after` (None: trimmed)."""
    content = content.lstrip() if before is None else content
    content = content.rstrip() if after is None else content
    return json.dumps(content, ensure_ascii=False)[1:-1] if before == after == r"\t" else content
