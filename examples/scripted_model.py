"""A chat server whose model is a script, for docs/coming-from.md: whatever asks it as OpenAI's protocol has it, it shops for fruit.

It asks for two prices, lets its helper add them up, and answers. Without a tool for prices it is the helper, and adds up.

    python examples/scripted_model.py 8000
"""

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def turn(messages: list[dict[str, Any]], tools: dict[str, Any]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """What the model says next, and what it calls."""
    texts = [message["content"] if isinstance(message["content"], str) else json.dumps(message["content"]) for message in messages]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if "price" not in tools:
        total = sum(int(a) * int(b) for a, b in re.findall(r"(\d+)\*(\d+)", " ".join(texts)))
        return end(str(total), tools)
    if not turns:
        return "", [("price", {"fruit": "pear"}), ("price", {"fruit": "apple"})]
    read = re.findall(r"\d+", re.sub(r"\[left .*?\]", "", " ".join(texts[turns[-1] + 1 :])))
    if len(turns) > 1:
        return end(read[-1], tools)
    helper = next(name for name in tools if name not in ("price", "final_answer"))
    work = f"3*{read[-2]}+2*{read[-1]}"
    if helper == "spawn_clone":
        return "", [(helper, {"objectives": [{"objective": work, "role": "adder"}]})]
    return "", [(helper, {next(iter(tools[helper]["properties"])): work})]


def end(answer: str, tools: dict[str, Any]) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """How it states its answer, to a framework that has a tool for that and to others."""
    return ("", [("final_answer", {"answer": answer})]) if "final_answer" in tools else (f"Answer: {answer}", [])


class Handler(BaseHTTPRequestHandler):
    """The endpoints for models and chat completions."""

    def do_GET(self) -> None:
        """List the one model."""
        self.reply({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def do_POST(self) -> None:
        """Answer with the next turn, whole."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in asked.get("tools") or []}
        text, calls = turn(asked["messages"], tools)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            start = len(asked["messages"])
            functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
            message["tool_calls"] = [
                {"id": f"call_{start}_{number}", "type": "function", "function": each} for number, each in enumerate(functions)
            ]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
        self.reply({"id": "1", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice], "usage": usage})

    def reply(self, body: dict[str, Any]) -> None:
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""


@contextmanager
def serving(port: int = 0) -> Iterator[str]:
    """The address of the server while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


if __name__ == "__main__":
    with serving(int(sys.argv[1])) as address:
        print(address, flush=True)
        threading.Event().wait()
