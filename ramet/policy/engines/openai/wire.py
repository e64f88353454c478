"""Messages as token ids of our own, for servers that take messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ramet.agents.calls import ParsedTurn, parse_spelled, tool_preamble
from ramet.agents.encoding import PlaceholderIds, no_vision
from ramet.agents.tree import Message


class WireFormat:
    """Messages as ids of our own: a few that mark roles, the others pieces of text. Tool calls are spelled Hermes tags.

    An id is the bytes of its piece, read as a number, so that a journal of ids can be read by any process. A prompt is cut into
    pieces of four characters, about a token each: limits on context and counts of prompt tokens are estimates.
    """

    ROLES = ("system", "user", "assistant", "tool")
    END = len(ROLES)
    LONGEST = 400
    """Characters of a piece: numbers of many more digits are refused where JSON is written and read."""
    placeholder_ids: PlaceholderIds = staticmethod(no_vision)

    def __init__(self) -> None:
        self.stop_ids = frozenset({self.END})

    def piece(self, text: str) -> int:
        """The id of a piece of text."""
        return self.END + int.from_bytes(b"\1" + text.encode("utf-8", "replace"), "big")

    def pieces(self, text: str, count: int) -> list[int]:
        """Text as `count` ids, the last ones empty where there are fewer characters; as more, if it is too long for so few."""
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

    def render(self, messages: Sequence[Message], tools: bool) -> list[int]:
        system = "\n\n".join(m.content for m in messages if m.role == "system")
        if tools:
            system = "\n\n".join(filter(None, [system, tool_preamble()]))
        ids = self._content("system", system) if system else []
        for message in messages:
            if message.role != "system":
                for segment in message.media:
                    self.placeholder_ids(segment)
                ids += self._content(message.role, message.content)
        return [*ids, self.ROLES.index("assistant")]

    def after_turn(self, text: str, closed: bool) -> list[int]:
        return [*([] if closed else [self.END]), *self._content("tool", text), self.ROLES.index("assistant")]

    def parse(self, sampled: Sequence[int]) -> ParsedTurn:
        return parse_spelled(self.text(sampled))

    def text(self, ids: Sequence[int]) -> str:
        return self._bytes(ids).decode("utf-8", "replace")

    def messages(self, ids: Sequence[int], fold_system: bool = False) -> list[dict[str, str]]:
        """The messages that ids stand for. Tool results go as the user's, marked: servers differ in what else they take.

        An assistant's turn without text, such as one that was all reasoning, is left out, and what stands around it is one message.
        `fold_system` puts the system message at the head of the first of the user.
        """
        starts = [at for at, i in enumerate(ids) if i < self.END]
        found: list[dict[str, str]] = []
        joined = False
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            role, content = self.ROLES[ids[start]], self.text(ids[start + 1 : end])
            if role == "tool":
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if role == "assistant" and not content.strip():
                joined = True
            elif joined and found and found[-1]["role"] == role:
                found[-1]["content"] += f"\n\n{content}"
            else:
                found.append({"role": role, "content": content})
                joined = False
        if fold_system and len(found) > 1 and found[0]["role"] == "system" and found[1]["role"] == "user":
            found[:2] = [{"role": "user", "content": f"{found[0]['content']}\n\n{found[1]['content']}"}]
        return found
