"""`ramet.Agent`: a question in, a tree out; with the nano model, and with a server that plays its part."""

from __future__ import annotations

import anyio
import pytest
from pydantic import BaseModel

import ramet
from ramet.agents.events import BranchStarted, TreeEnded
from ramet.agents.tree import Status
from ramet.errors import CheckpointError, ConfigError, TaskError
from tests.policy.raw_server import says, serve, stream, usage
from tests.test_base_install import without_extras

SUM = "3+4-2+7-9+5+8-1+6+2+4-3+5+1"


def answering(text: str) -> bytes:
    """A chat server's streamed reply."""
    return stream(says(text), says("", "stop"), usage(4))


def test_a_script_asks_in_one_line():
    tree = ramet.Agent("nano").run_sync(SUM, budget=256)
    assert tree.answer == "30" and tree.usage.clones > 0


def test_documents_are_given_by_key():
    tree = ramet.Agent("nano").run_sync("sum", {"A": "3+4-2+7-9", "B": "+5+8-1+6+2", "C": "+4-3+5+1"}, budget=256)
    assert tree.answer == "30"


def test_where_a_loop_runs_it_says_to_await():
    async def notebook() -> None:
        agent = ramet.Agent("nano")
        with pytest.raises(ConfigError, match=r"write `await agent\.run"):
            agent.run_sync("1+2")
        assert (await agent.run("1+2", budget=64)).answer == "3"

    anyio.run(notebook)


def test_an_agent_that_is_entered_answers_several_questions_at_once_and_one_that_is_not_says_how():
    async def main() -> None:
        answers: dict[str, str | None] = {}

        async def ask(agent: ramet.Agent, question: str) -> None:
            answers[question] = (await agent.run(question, budget=64)).answer

        async with ramet.Agent("nano") as agent, anyio.create_task_group() as group:
            for question in ("1+2", "4+5", "7-3"):
                group.start_soon(ask, agent, question)
        assert answers == {"1+2": "3", "4+5": "9", "7-3": "4"}
        with pytest.raises(BaseExceptionGroup) as caught:
            async with anyio.create_task_group() as group:
                agent = ramet.Agent("nano")
                group.start_soon(ask, agent, SUM)
                group.start_soon(ask, agent, SUM)
        (error,) = caught.value.exceptions
        assert isinstance(error, ConfigError) and "async with Agent" in str(error)

    anyio.run(main)


def test_events_come_as_they_happen_and_a_tree_is_gone_on_with():
    async def main() -> None:
        async with ramet.Agent("nano") as agent:
            events = [event async for event in agent.stream(SUM, budget=256)]
            assert isinstance(events[0], BranchStarted) and isinstance(events[-1], TreeEnded)
            first = events[-1].tree
            second = await agent.run("+1", budget=32, after=first)
            assert list(second.root.prompt[: len(first.root.ids)]) == first.root.ids

    anyio.run(main)


def test_a_server_is_told_the_documents_the_tools_and_the_type_of_the_answer():
    class City(BaseModel):
        """What is asked for."""

        name: str

    def population(city: str) -> int:
        """How many live there."""
        return 1

    with serve(answering('Answer: {"name": "Bern"}')) as (url, asked):
        agent = ramet.Agent(url=url, tools=[population], system="Be brief.")
        tree = agent.run_sync("Which city?", {"notes/a.md": "Bern is one.", "b": "x" * 5000}, answer=City)
    assert tree.value == City(name="Bern") and asked[0]["model"] == "m"
    system, user = (message["content"] for message in asked[0]["messages"][:2])
    told = str(asked[0])
    assert "Be brief." in system and "Documents: notes/a.md (12 characters), b (5,000 characters)" in user and "Bern is one" not in told
    assert all(word in told for word in ("population", "spawn_clone", "read", "fits this schema"))


def test_a_server_s_model_may_spawn_only_where_the_budget_allows_it():
    with serve(answering("Answer: 42")) as (url, asked):
        tree = ramet.Agent("other", url=url).run_sync("Six times seven?", budget=ramet.Budget(generated=100, depth=0))
    assert tree.answer == "42" and asked[0]["model"] == "other" and "spawn_clone" not in str(asked[0])


def test_a_program_decides_and_its_tools_are_the_agent_s():
    async def program(branch: ramet.ProgramBranch) -> str:
        return (await branch.call("twice", n=21)).text

    def twice(n: int) -> int:
        """Twice a number."""
        return 2 * n

    tree = ramet.Agent("nano", tools=[twice], program=program).run_sync("1+2")
    assert tree.answer == "42" and tree.root.status is Status.ANSWERED and tree.tools()["twice"].calls == 1


@pytest.mark.parametrize(
    ("make", "says_so"),
    [
        (lambda: ramet.Agent("nano", temperature=1.0), "Agent takes no temperature"),
        (lambda: ramet.Agent("nowhere/at-all").run_sync("1+2"), "nowhere/at-all"),
        (lambda: ramet.Agent("nano", device="tpu"), "device takes"),
        (lambda: ramet.Agent("nano", tools=[lambda x: x]), "lambda"),
        (lambda: ramet.Agent("nano").run_sync("1+2", budget=0), "give at least 1"),
        (lambda: ramet.Agent("nano").run_sync(ramet.Task("t", (ramet.Message("user", "1"),)), {"A": "1"}), "its own documents"),
    ],
)
def test_what_cannot_be_meant_is_one_line(make, says_so):
    with pytest.raises((ConfigError, CheckpointError), match=says_so):
        make()


def test_the_nano_model_says_what_it_can_be_asked():
    with pytest.raises(TaskError, match=r"sum|expression"):
        ramet.Agent("nano").run_sync("What is the capital of France?")


def test_with_a_server_nothing_needs_torch():
    with serve(answering("Answer: 42")) as (url, _):
        program = f"import ramet; print(ramet.Agent(url={url!r}).run_sync('Six times seven?').answer)"
        done = without_extras(program)
    assert done.stdout == "42\n", done.stderr
