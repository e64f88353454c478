"""ChatFormat: messages to token ids, once.

The initial prompt of a branch is rendered once. After that, ids are only appended: first those that the model sampled, then those
that `after_turn` returns. Nothing that was sampled is ever encoded again, so the ids that are trained on are the ids that were
sampled.

There are three formats: `ControlTokenFormat` (the nano model: one control token for each piece of structure), `ChatMLFormat` (for
models that were trained on ChatML but have no chat template; chosen by name only) and `ramet.agents.templates.TemplateFormat` (the
model's own Hugging Face chat template).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from ramet.agents.calls import ParsedTurn, Schemas, names_of, parse_marked, parse_spelled, spelled_call, tool_preamble
from ramet.agents.encoding import PlaceholderIds, TokenizerFormat, decode, token_id
from ramet.agents.protocol import SPAWN
from ramet.agents.templates import TemplateFormat
from ramet.agents.tree import Message
from ramet.errors import ChatFormatError


class ChatFormat(Protocol):
    """How a model's conversations are written as token ids."""

    stop_ids: frozenset[int]
    """Token ids that end a turn."""
    placeholder_ids: PlaceholderIds
    """The token ids that stand for a video; formats of models without vision raise `ChatFormatError`."""

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """The ids of a branch's prompt, up to and including the opening of the first assistant turn.

        `tools` are the JSON schemas of what the branch may call. Their names and descriptions are as untrusted as all content.
        """

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The ids of a whole assistant turn with this text, and a call of this JSON: for demonstrations, programs and scripts."""

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """The ids to append to a sampled turn: its end unless it is `closed`, a message with `text`, the next turn's opening.

        `role`: whose message it is; "user" goes on with a finished conversation. Raises `ChatFormatError` if the format cannot.
        """

    def after_calls(self, replies: Sequence[str], closed: bool) -> list[int]:
        """As `after_turn`, for the replies to the calls of the turn, in call order: one text, or a message each where models expect it."""

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read one sampled turn: its text and its calls. What is malformed is reported in the result, never raised."""

    def text(self, ids: Sequence[int]) -> str:
        """Ids as text for people to read. It is never encoded again."""


def turn_end(chat: ChatFormat) -> int:
    """The id with which the format itself closes a turn; `stop_ids` may hold others besides."""
    return chat.after_turn("", closed=False)[0]


class ControlTokenFormat(TokenizerFormat):
    """The nano model's format: every piece of structure is one control token.

    `<|begin|>`, then `<|tools|>` if the branch may call tools, with the names of those beside `spawn_clone`, then each message as
    `<|role|>content<|end|>`.
    There is no system role: system messages are left out.
    """

    CONTROL = ("<|pad|>", "<|begin|>", "<|end|>", "<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>", "<tool_call>", "</tool_call>")

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self._id = {token: token_id(tokenizer, token) for token in self.CONTROL}
        self.stop_ids = frozenset({self._id["<|end|>"]})

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """The ids of a prompt; `<|tools|>` stands for the whole description of `spawn_clone`."""
        ids = [self._id["<|begin|>"]]
        if tools:
            others = " ".join(name for name in names_of(tools) if name != SPAWN)
            ids += [self._id["<|tools|>"], *self._encode(others)]
        for message in messages:
            if message.role != "system":
                ids += [self._id[f"<|{message.role}|>"], *self._encode.assembled(self._content(message)), self._id["<|end|>"]]
        return [*ids, self._id["<|assistant|>"]]

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """`<|end|>` unless the turn is closed, then a `<|tool|>` or `<|user|>` message and the next `<|assistant|>`."""
        end = [] if closed else [self._id["<|end|>"]]
        return [*end, self._id[f"<|{role}|>"], *self._encode(text), self._id["<|end|>"], self._id["<|assistant|>"]]

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The text, the call between `<tool_call>` and `</tool_call>`, and `<|end|>`."""
        ids = self._encode(text)
        if call is not None:
            ids += [self._id["<tool_call>"], *self._encode(call), self._id["</tool_call>"]]
        return [*ids, self._id["<|end|>"]]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read a turn whose calls stand between the control tokens `<tool_call>` and `</tool_call>`."""
        return parse_marked(self._tokenizer, sampled, self.stop_ids, self._id["<tool_call>"], self._id["</tool_call>"])


class ChatMLFormat(TokenizerFormat):
    """ChatML: `<|im_start|>role ... <|im_end|>`, with Hermes tool calls.

    If the tokenizer has `<tool_call>` as one token (Qwen), only that token opens a call; otherwise the tag as text does, in the turn
    that is parsed.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self._start = token_id(tokenizer, "<|im_start|>")
        self._end = token_id(tokenizer, "<|im_end|>")
        stops = {self._end}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.stop_ids = frozenset(stops)
        added = tokenizer.get_added_vocab()
        self._markers = (added["<tool_call>"], added["</tool_call>"]) if "<tool_call>" in added and "</tool_call>" in added else None

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """The ids of a prompt; the tools are described at the end of the system message."""
        parts: list[int | str] = []
        if tools:
            system = "\n\n".join(message.content for message in messages if message.role == "system")
            messages = [m for m in messages if m.role != "system"]
            before, schemas, after = tool_preamble(tools)
            described = [*self._encode.trusted(before), schemas, *self._encode.trusted(after)]
            parts += [*self._opening("system"), system + "\n\n" if system else "", *described, *self._closing()]
        for message in messages:
            parts += [*self._opening(message.role), *self._content(message), *self._closing()]
        return self._encode.assembled([*parts, *self._opening("assistant")], start=True)

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """The end of the turn unless it is closed, a user message, a tool's in `<tool_response>`, and the next assistant opening."""
        end = [] if closed else [self._end]
        response = [*self._encode.trusted("<tool_response>\n"), text, *self._encode.trusted("\n</tool_response>")]
        content = response if role == "tool" else [text]
        return self._encode.assembled([*end, "\n", *self._opening("user"), *content, *self._closing(), *self._opening("assistant")])

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The text, the call in its tags, and the end of the turn."""
        return self._encode.assembled([text, *(spelled_call(self._encode, call) if call is not None else []), self._end])

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """Read a turn whose calls stand between `<tool_call>` tags, as control tokens or as text."""
        if self._markers is not None:
            return parse_marked(self._tokenizer, sampled, self.stop_ids, *self._markers)
        return parse_spelled(decode(self._tokenizer, [i for i in sampled if i not in self.stop_ids]))

    def _opening(self, role: str) -> list[int | str]:
        return [self._start, role + "\n"]

    def _closing(self) -> list[int | str]:
        return [self._end, "\n"]


def chat_format(name: str, tokenizer: Any) -> ChatFormat:
    """The format called `name`: "nano", "chatml", "template" or "auto". Raises `ChatFormatError` if the tokenizer does not suit it.

    "auto" uses the tokenizer's own chat template or, without one, nano's control tokens. It guesses nothing else.
    """
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
