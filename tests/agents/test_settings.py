"""What cannot be meant is refused where it is said, with what can be."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.tasks import Slots
from ramet.agents.tree import Message, Segment, Task
from ramet.errors import ConfigError, StorageError, TaskError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", t) for t in (-1, -1e-9, math.nan, math.inf, -math.inf)),
        *(("top_p", p) for p in (0, -0.1, 1.1, math.nan, math.inf)),
        *(("top_k", k) for k in (-1, 0.5)),
    ],
)
def test_a_distribution_that_there_is_not(name, value):
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["concurrency", "max_turn_tokens", "result_characters", "attempts"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_runtime_that_could_do_nothing(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; give at least 1"):
        Runtime(ScriptedPolicy(lambda _: ""), PlainFormat(), **{name: value})


@pytest.mark.anyio
async def test_no_trees_in_flight():
    runtime = Runtime(ScriptedPolicy(lambda _: "\0"), PlainFormat())
    with pytest.raises(ConfigError, match="in_flight is 0; give at least 1"):
        async with runtime.run_many([Job(Task("t", (Message("user", "go"),)), Budget())], in_flight=0):
            pass
    with pytest.raises(ConfigError, match="at least 1"):
        Slots(0)


def test_messages_and_parts_of_videos_that_there_are_not():
    for role in ("usr", "", "User", "developer"):
        with pytest.raises(TaskError, match="choose one of system, user, assistant, tool"):
            Message(role, "x")
    for content in (None, 3, ["x"], b"x"):
        with pytest.raises(TaskError, match="the content of a message is text"):
            Message("user", content)
    for start, end in ((-1, None), (2, 1), (1, 1), (math.nan, None), (0, math.nan), (math.inf, None)):
        with pytest.raises(TaskError, match="a part of a video"):
            Segment("a.mp4", start, end)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_a_time_that_cannot_pass(seconds):
    with pytest.raises(ValidationError, match="seconds"):
        Budget(seconds=seconds)


def test_a_journal_is_written_by_one_at_a_time(tmp_path):
    with Journal(tmp_path / "j", "job") as journal:
        with pytest.raises(StorageError, match="another process is writing"):
            Journal(tmp_path / "j", "job")
        journal.append({"n": 1})
    with Journal(tmp_path / "j", "job") as journal:
        assert journal.records == [{"n": 1}]
