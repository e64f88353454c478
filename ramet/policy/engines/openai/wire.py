"""A chat format with invented token ids, for servers that accept messages, not ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from ramet.agents.calls import ParsedTurn, Schemas, parse_spelled, tool_preamble
from ramet.agents.encoding import PlaceholderIds, no_vision
from ramet.agents.tree import Message


class WireFormat:
    """Messages as invented ids: a few that mark roles, all others pieces of text. Tool calls are written in Hermes tags.

    The id of a piece is its bytes, read as a number, so any process can read a journal of ids. A prompt is cut into
    pieces of four characters, about one token each: limits on context and counts of prompt tokens are estimates.
    """

    ROLES = ("system", "user", "assistant", "tool")
    END = len(ROLES)
    LONGEST = 400
    """The longest piece, in characters: JSON readers refuse numbers of many more digits."""
    placeholder_ids: PlaceholderIds = staticmethod(no_vision)

    def __init__(self) -> None:
        self.stop_ids = frozenset({self.END})

    def piece(self, text: str) -> int:
        """The id of a piece of text."""
        return self.END + int.from_bytes(b"\1" + text.encode("utf-8", "replace"), "big")

    def pieces(self, text: str, count: int) -> list[int]:
        """The text as `count` ids, the last ones empty if it has fewer characters, and as more ids if it is too long for `count`."""
        length = max(-(-len(text) // count) if count else 0, 1)
        cut = [text[i : i + length] for i in range(0, len(text), length)] if length <= self.LONGEST and count else []
        if text and not cut:
            cut = [text[i : i + self.LONGEST] for i in range(0, len(text), self.LONGEST)]
        return [self.piece(part) for part in cut] + [self.piece("")] * (count - len(cut))

    def _bytes(self, pieces: Iterable[int]) -> bytes:
        numbers = [i - self.END for i in pieces if i > self.END]
        return b"".join([n.to_bytes((n.bit_length() + 7) // 8, "big")[1:] for n in numbers])

    def _content(self, role: str, text: str) -> list[int]:
        return [self.ROLES.index(role), *(self.piece(text[i : i + 4]) for i in range(0, len(text), 4)), self.END]

    def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
        """As `ChatFormat.render`: the ids of messages and of the start of the assistant's turn, with the tools described first."""
        system = "\n\n".join(m.content for m in messages if m.role == "system")
        if tools:
            system = "\n\n".join(filter(None, [system, "".join(tool_preamble(tools))]))
        ids = self._content("system", system) if system else []
        for message in messages:
            if message.role != "system":
                for segment in message.media:
                    self.placeholder_ids(segment)
                ids += self._content(message.role, message.content)
        return [*ids, self.ROLES.index("assistant")]

    def after_turn(self, text: str, closed: bool, role: Literal["tool", "user"] = "tool") -> list[int]:
        """As `ChatFormat.after_turn`: the ids of a message and of the start of the next turn. `closed`: the last turn has its end."""
        return [*([] if closed else [self.END]), *self._content(role, text), self.ROLES.index("assistant")]

    def turn(self, text: str, call: str | None = None) -> list[int]:
        """The text, the call in Hermes tags, and the end of the turn."""
        spelled = text if call is None else f"{text}<tool_call>\n{call}\n</tool_call>"
        return [*(self.piece(spelled[i : i + 4]) for i in range(0, len(spelled), 4)), self.END]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        """As `ChatFormat.parse`: the answer and the tool calls of a turn."""
        return parse_spelled(self.text(sampled))

    def text(self, ids: Sequence[int]) -> str:
        """As `ChatFormat.text`: the text of the pieces; ids of roles are left out."""
        return self._bytes(ids).decode("utf-8", "replace")

    def messages(self, ids: Sequence[int], fold_system: bool = False) -> list[dict[str, str]]:
        """The messages that ids encode. Tool results become tagged user messages, since not all servers accept the role "tool".

        An assistant turn without text, such as one of reasoning alone, is left out, and the messages around it are joined.
        `fold_system` puts the system message at the start of the first user message.
        """
        starts = [at for at, i in enumerate(ids) if i < self.END]
        messages: list[dict[str, str]] = []
        joined = False
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            role, content = self.ROLES[ids[start]], self.text(ids[start + 1 : end])
            if role == "tool":
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if role == "assistant" and not content.strip():
                joined = True
            elif joined and messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n\n{content}"
            else:
                messages.append({"role": role, "content": content})
                joined = False
        if fold_system and len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            messages[:2] = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}]
        return messages
