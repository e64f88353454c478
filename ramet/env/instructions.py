"""Instructions at the end of a question in words: to answer at once, to think first, or to use the tool."""

from __future__ import annotations

from dataclasses import replace

from ramet.agents.tree import Task

DIRECT = "Give only the answer, as short as it can be, in one line: `Answer: ...`."
COT = "Think step by step, briefly. Then give the answer, as short as it can be, in one line: `Answer: ...`."
DELEGATE = (
    "You may hand parts of this to clones of yourself with the tool: give each an objective, and the documents that it needs "
    "by their titles as context_keys. Give the answer, as short as it can be, in one line: `Answer: ...`."
)
WATCH = (
    "You may have clones of yourself watch segments with the tool: give each an objective, and the segments that it is to see by their "
    "keys as context_keys. Give the answer, as short as it can be, in one line: `Answer: ...`."
)
DELEGATE_PARTS = (
    "You may hand parts of this to clones of yourself with the tool: give each an objective that says all it needs. Think step by step, "
    "briefly. Then give the answer, as short as it can be, in one line: `Answer: ...`."
)
DOCUMENTS = (
    "You may read documents into your own context with the tool read, or hand parts of this to clones of yourself with spawn_clone: give "
    "each an objective, and the documents that it needs by their keys as context_keys. Think step by step, briefly. Then give the answer, "
    "as short as it can be, in one line: `Answer: ...`."
)


def instructed(task: Task, instruction: str) -> Task:
    """The task with an instruction at the end of its last message, so that the prompts of different methods share a prefix."""
    *before, last = task.messages
    return replace(task, messages=(*before, replace(last, content=f"{last.content}\n\n{instruction}")))
