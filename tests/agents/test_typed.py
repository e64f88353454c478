"""Answers of a type: told to the model, sent back while the budget lasts, read as values; on both of anyio's backends."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from ramet.agents.budget import Budget
from ramet.agents.program import ProgramBranch
from ramet.agents.protocol import Objective, parse_call
from ramet.agents.runtime import Runtime
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.tree import Message, Status, Task, Tree
from ramet.agents.typed import AnswerType
from ramet.errors import AnswerError, CallError, ProgramError, TaskError

PLAIN = PlainFormat()


class City(BaseModel):
    """An answer of two fields."""

    name: str
    people: Annotated[int, Field(ge=0)]


class Colour(enum.Enum):
    """An answer out of few."""

    RED = "red"


async def run(model: Any, kind: Any, budget: Budget | None = None, **options: Any) -> Tree:
    task = Task("t", (Message("user", "root"),), {"A": "x"}, answer=kind)
    return await Runtime(ScriptedPolicy(model), PLAIN).run(task, budget or Budget(), **options)


@pytest.mark.anyio
async def test_the_model_is_told_the_schema_and_the_value_is_read():
    tree = await run(lambda context: 'Answer: {"name": "Bern", "people": 5}\0', City)
    assert tree.value == City(name="Bern", people=5) and tree.root.status is Status.ANSWERED
    assert tree.answer == '{"name":"Bern","people":5}'
    assert '"people": {"minimum": 0' in PLAIN.text(tree.root.prompt)
    assert (await run(lambda context: "Answer: Bern\0", None)).value is None


@pytest.mark.anyio
async def test_what_does_not_fit_goes_back_with_what_is_wrong():
    def model(context: str) -> str:
        return "Answer: 7\0" if "greater than or equal to 5" in context and "; answer again)" in context else "Answer: 3\0"

    tree = await run(model, Annotated[int, Field(ge=5)])
    assert (tree.value, tree.answer, len(tree.root.turns)) == (7, "7", 2)
    assert all(tree.root.mask[len(tree.root.prompt) + at] for at in range(len("Answer: 3$")))  # its own turns are trained, as all are


@pytest.mark.anyio
@pytest.mark.parametrize("budget", [Budget(turns=3), Budget(generated=100), Budget(context=400), Budget(generated=100, answer_reserve=12)])
async def test_an_answer_that_never_fits_ends_with_the_budget_and_says_why(budget: Budget):
    tree = await run(lambda context: "Answer: a lot\0", int, budget)
    assert tree.answer is None and tree.value is None and tree.root.status in (Status.EMPTY, Status.OUT_OF_BUDGET)
    assert "valid integer" in tree.root.reason or tree.root.reason in ("generated", "turns")
    assert len(tree.root.turns) > 1
    assert budget.generated is None or tree.usage.generated <= budget.generated


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "Answer: 12", 12),
        (float, r"so \boxed{1.5}", 1.5),
        (bool, "Answer: true", True),
        (str, "Answer: 12", "12"),
        (str, 'Answer: "Bern"', "Bern"),
        (Colour, "Answer: red", Colour.RED),
        (list[int], "Answer: [1, 2]", [1, 2]),
        (list[int], "Answer:\n[\n 1,\n 2\n]\nThat is all.", [1, 2]),
        (City, 'Answer: {"name": "Bern",\n "people": 5}\n', City(name="Bern", people=5)),
        (City, '```json\n{"name": "Bern", "people": 5}\n```', City(name="Bern", people=5)),
        (City, '{"name": "Bern",\n"people": 5}', City(name="Bern", people=5)),
        (City, 'Answer: {"name": "x"}\nNo.\nAnswer: {"name": "Bern", "people": 5}', City(name="Bern", people=5)),
        (City, '<think>Answer: {"name": "x", "people": 1}</think>Answer: {"name": "Bern", "people": 5}', City(name="Bern", people=5)),
    ],
)
def test_values_are_read_where_models_write_them(kind: Any, text: str, value: Any):
    assert AnswerType(kind).read(text)[0] == value


@given(st.text(alphabet='{}[]":,aA1 \n\\nswer:`json<think>/') | st.text())
def test_whatever_a_model_writes_is_a_value_or_a_typed_error(text: str):
    for kind in (City, int, list[int]):
        try:
            value, answer = AnswerType(kind).read(text)
        except AnswerError as error:
            assert len(str(error)) < 1000
        else:
            assert AnswerType(kind).read(f"Answer: {answer}")[0] == value


def test_hostile_nesting_is_an_error():
    for text in ("Answer: " + "[" * 100_000, "Answer: [" * 50_000, '{"a":' * 50_000):
        with pytest.raises(AnswerError):
            AnswerType(list[int]).read(text)


def test_what_is_no_type_is_one_line():
    class Socket:
        """Nothing that pydantic knows."""

    with pytest.raises(TaskError, match="cannot be of the type Socket: give a pydantic model"):
        AnswerType(Socket)


@pytest.mark.anyio
async def test_programs_ask_clones_for_values_and_answer_with_one():
    async def program(branch: ProgramBranch) -> City:
        one, two = await branch.spawn([{"objective": "count", "schema": int}, Objective(objective="name", schema=list[str])], ["A"])
        assert one.value == 3 and two.value == ["Bern"] and two.answer == '["Bern"]'
        return City(name=two.value[0], people=one.value)

    tree = await run(lambda context: 'Answer: ["Bern"]\0' if "name" in context else "Answer: 3\0", City, program=program)
    assert tree.value == City(name="Bern", people=3) and tree.answer == '{"name":"Bern","people":3}'
    assert "schema" not in PLAIN.text(tree.root.turns[0].sampled)

    async def wrong(branch: ProgramBranch) -> str:
        return "many"

    with pytest.raises(ProgramError, match="valid integer"):
        await run(lambda context: "\0", int, program=wrong)


def test_a_model_cannot_give_a_schema():
    with pytest.raises(CallError, match="only a program"):
        parse_call('{"name": "spawn_clone", "arguments": {"objectives": [{"objective": "a", "schema": {"type": "integer"}}]}}')
