"""The rules of ledger and actor one by one, each to the token: what a mutation of either would break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import anyio
import pytest

from ramet.agents.attempts import _pause
from ramet.agents.budget import Budget, Ledger
from ramet.agents.calls import Schemas
from ramet.agents.growth import Growth, seed_of
from ramet.agents.protocol import OUT_OF_BUDGET_NOTICE, CloneResult, left_line, render_results, tool_schema
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.simulation import simulate
from ramet.agents.tree import Message, Status, StopReason, Tree
from ramet.errors import BudgetExhausted, LedgerError, PolicyError, RefusedRequest, TransientPolicyError
from tests.agents.test_runtime import failing, grow, spawn, task

pytestmark = pytest.mark.anyio


def test_totals_count_clones_that_still_run():
    ledger = Ledger.for_root(Budget())
    with ledger.reserve(10, 3) as grant:
        grant.settle(7, 3)
    with ledger.fork([None, None]) as fork:
        for clone, used in zip(fork.ledgers, (4, 5), strict=True):
            with clone.reserve(used, 2) as grant:
                grant.settle(used, 2)
        assert [ledger.total(c) for c in ("generated", "prefilled")] == [16, 7]
        assert ledger.spent("generated") == 7
    assert [ledger.total(c) for c in ("generated", "prefilled", "clones")] == [16, 7, 2]


def test_a_fork_shares_what_is_left_in_every_currency():
    ledger = Ledger.for_root(Budget(generated=100, prefilled=101, critical_path=60, clones=9, answer_reserve=10))
    with ledger.fork([None, 20], keep_prefilled=20) as fork:
        lefts = [[clone.left(c) for c in ("generated", "prefilled", "critical_path", "clones")] for clone in fork.ledgers]
        assert lefts == [[70, 40, 50, 3], [20, 40, 20, 3]]
        assert ledger.reserved("prefilled") == 80
    with ledger.fork([None], keep_prefilled=200) as fork:
        assert fork.ledgers[0].left("prefilled") == 0
    with Ledger.for_root(Budget(critical_path=30)).fork([None, 50, 8]) as fork:
        assert [clone.left("critical_path") for clone in fork.ledgers] == [30, 30, 8], "a clone's own limit is also its path's"
        assert [clone.left("generated") for clone in fork.ledgers] == [None, 50, 8]
    with Ledger.for_root(Budget()).fork([None, 9]) as fork:
        assert [clone.left("critical_path") for clone in fork.ledgers] == [None, 9]


def test_errors_say_what_and_how_much():
    ledger = Ledger.for_root(Budget(clones=2))
    with pytest.raises(BudgetExhausted) as caught:
        ledger.fork([None] * 3)
    assert (caught.value.currency, caught.value.wanted, caught.value.left) == ("clones", 3, 2)
    with pytest.raises(LedgerError, match=r"^a clone's ledger closes with reservations open$"), ledger.fork([None]) as fork:
        fork.ledgers[0].reserve(1, 1)


def test_seeds_are_a_function_of_the_place():
    """Journals name samples by their place, so this may not change without a new journal version."""
    assert seed_of(0, "0", 0) == 4808561972376111626
    assert all(0 <= seed_of(seed, "0.1", 2) < 2**63 for seed in range(200))
    assert len({seed_of(s, b, t) for s in range(5) for b in ("0", "0.0", "0.1") for t in range(5)}) == 75


def test_pauses_double_up_to_ten_seconds():
    """No shorter than 0.1, 0.2, 0.4, ... seconds and than the server asks for, and at most twice the former on top."""
    for n, backoff in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.8), (8, 10.0), (80, 10.0)):
        for retry_after in (None, 0.0, 3.0, 60.0):
            jitter = [_pause(TransientPolicyError("busy", retry_after), n, seed) - max(backoff, retry_after or 0.0) for seed in range(200)]
            assert -1e-9 <= min(jitter) < 0.2 * backoff and 1.8 * backoff < max(jitter) <= 2 * backoff + 1e-9
    assert _pause(TransientPolicyError("busy"), 3, 7) == _pause(TransientPolicyError("busy"), 3, 7), "a function of the request"
    assert _pause(TransientPolicyError("busy", 60.0, past=True), 5, 0) == 0.0, "an earlier run has waited"


def test_the_runtime_waits_as_long_as_it_should_and_counts_the_time():
    """On a virtual clock: two failures, and two whose server asks for 3 and 5 seconds."""

    async def main() -> list[Tree]:
        trees = []
        for errors in (
            {0: TransientPolicyError("reset"), 1: TransientPolicyError("reset")},
            {0: TransientPolicyError("429", 3.0), 1: TransientPolicyError("429", 5.0)},
        ):
            policy = ScriptedPolicy(lambda _: "Answer: 1\0", faults=failing(errors, after=0))
            trees.append(await Runtime(policy, PlainFormat()).run(task(), Budget()))
        return trees

    seed = seed_of(0, "0", 0)
    for tree, retry_afters in zip(simulate(main, 0), ((None, None), (3.0, 5.0)), strict=True):
        assert tree.root.seconds == pytest.approx(sum(_pause(TransientPolicyError("", a), n, seed) for n, a in enumerate(retry_afters, 1)))
        assert tree.answer == "1"


def test_seconds_of_a_branch_are_its_own():
    def program(context: str) -> str:
        if context.startswith("T"):
            return "Answer: up\0" if "1: " in context else spawn("a", "bb")
        return ("x" * (10 if "bb" in context else 4)) + " Answer: 1\0"

    async def main() -> Tree:
        await anyio.sleep(100)
        return await Runtime(ScriptedPolicy(program, delay=0.1), PlainFormat()).run(task(), Budget())

    tree = simulate(main, 0)
    tokens = [len(clone.turns[0].sampled) for clone in tree.root.clones]
    assert [clone.seconds for clone in tree.root.clones] == pytest.approx([0.1 * n for n in tokens])
    own = sum(len(turn.sampled) for turn in tree.root.turns)
    assert tree.root.seconds == pytest.approx(0.1 * (own + max(tokens)))


def test_a_cancelled_tree_keeps_its_clones_and_their_time():
    def program(context: str) -> str:
        return spawn("a") if context.startswith("T") else "y" * 10_000

    async def main() -> Tree:
        await anyio.sleep(50)
        return await Runtime(ScriptedPolicy(program, delay=0.1), PlainFormat()).run(task(), Budget(seconds=20))

    tree = simulate(main, 0)
    (clone,) = tree.root.clones
    assert clone.status is Status.CANCELLED or clone.status is Status.TIMED_OUT
    assert 0 < clone.seconds < 20 == pytest.approx(tree.root.seconds)
    assert clone.turns[-1].stop is StopReason.CANCELLED
    assert clone.turns[-1].version == 3, "of the policy that sampled it"


class Recording(ScriptedPolicy):
    """Keeps what it was asked."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.recorded: list[SampleRequest] = []

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        self.recorded.append(request)
        return await super().sample(request, partial)


async def test_requests_carry_the_trees_settings():
    policy = Recording(lambda c: "Answer: 1\0" if not c.startswith("T") or "1: " in c else spawn("a"))
    sampling = Sampling(temperature=0.3, top_k=5)
    await Runtime(policy, PlainFormat(), sampling).run(task(), Budget(), seed=7)
    assert {request.sampling for request in policy.recorded} == {sampling}
    assert len({request.group for request in policy.recorded}) == 1
    assert policy.recorded[0].group
    assert [request.seed for request in policy.recorded] == [seed_of(7, "0", 0), seed_of(7, "0.0", 0), seed_of(7, "0", 1)]


@pytest.mark.parametrize(("attempts", "calls"), [(1, 1), (2, 2), (3, 3)])
async def test_attempts_are_counted(attempts: int, calls: int):
    errors = {n: TransientPolicyError("reset", 0.0) for n in range(9)}
    policy = Recording(lambda _: "Answer: 1\0", faults=failing(errors, after=1))
    tree = await Runtime(policy, PlainFormat(), attempts=attempts).run(task(), Budget())
    assert len(policy.recorded) == calls
    assert tree.root.status is Status.FAILED
    assert tree.usage.generated == calls
    (turn,) = tree.root.turns
    assert (turn.stop, turn.sampled, turn.discarded) == (StopReason.FAILED, (), calls)
    assert turn.discarded_prefilled == calls * len(tree.root.prompt)


async def test_a_failed_attempt_that_only_read_is_charged_for_reading():
    policy = Recording(lambda _: "Answer: 1\0", faults=failing({0: PolicyError("broken")}, after=0))
    tree = await Runtime(policy, PlainFormat()).run(task(), Budget())
    assert tree.root.status is Status.FAILED
    assert tree.root.turns[-1].discarded_prefilled == tree.usage.prefilled == len(tree.root.prompt)
    assert tree.usage.generated == 0


async def test_a_retry_of_the_final_turn_may_use_the_reserve_and_no_more():
    """Twenty tokens, eight of them kept for the answer: the final turn fails after three and has five left."""
    policy = Recording(lambda c: "Answer: 1\0" if "budget" in c else "y" * 50, faults=failing({1: TransientPolicyError("x", 0.0)}, after=3))
    await Runtime(policy, PlainFormat()).run(task(), Budget(generated=20, answer_reserve=8))
    assert [request.max_tokens for request in policy.recorded] == [12, 8, 5]


class Wasteful(Recording):
    """Generates all that it was granted, less what `spare` says, and then fails."""

    spare = 0

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        self.recorded.append(request)
        partial.ids += [1] * (request.max_tokens - (self.spare if len(self.recorded) == 1 else 0))
        raise TransientPolicyError("gone", 0.0)


@pytest.mark.parametrize(("spare", "grants"), [(0, [12]), (1, [12, 1]), (2, [12, 2])])
async def test_attempts_end_with_the_tokens(spare: int, grants: list[int]):
    policy = Wasteful(lambda _: "")
    policy.spare = spare
    tree = await Runtime(policy, PlainFormat(), attempts=9).run(task(), Budget(generated=12))
    assert [request.max_tokens for request in policy.recorded] == grants
    assert (tree.root.status, tree.error) == (Status.FAILED, "gone"), "it was not the answer that used up the budget"
    assert tree.usage.generated == sum(turn.discarded for turn in tree.root.turns) == 12


async def test_an_answer_for_which_failed_attempts_left_no_room_has_failed():
    """Forty tokens an answer, a hundred to spend: the third attempt is cut, and not because of what the model said."""
    reset = TransientPolicyError("connection reset", 0.0)
    policy = Recording(lambda _: "y" * 39 + "\0", faults=failing({0: reset, 1: reset}, after=40))
    tree = await Runtime(policy, PlainFormat()).run(task(), Budget(generated=100))
    assert tree.root.status is Status.FAILED and tree.answer is None
    assert tree.error == "connection reset (failed attempts used up the budget: 78 tokens)"
    # What clones lose is lost to their parent too.
    program = lambda c: "y" * 39 + "\0" if not c.startswith("T") or "1: " in c else spawn("a")  # noqa: E731
    policy = Recording(program, faults=failing({1: reset}, after=30))
    tree = await Runtime(policy, PlainFormat()).run(task(), Budget(generated=len(spawn("a")) + 100))
    assert [clone.status for clone in tree.root.clones] == [Status.ANSWERED]
    assert tree.root.status is Status.FAILED and "connection reset (failed attempts used up the budget: 30 tokens)" in tree.error


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(generated=5), "generated"),
        (Budget(critical_path=5), "critical_path"),
        (Budget(branch_generated=5, generated=9), "branch_generated"),
        (Budget(generated=9, answer_reserve=4), "generated"),
        (Budget(context=20), "the budget's context of 20 tokens"),
        (Budget(prefilled=3), "prefilled"),
        (Budget(generated=0), "generated"),
    ],
)
async def test_what_runs_out_is_named(budget: Budget, reason: str):
    tree = await grow(lambda _: "y" * 50, budget)
    assert (tree.root.status, tree.root.reason) == (Status.OUT_OF_BUDGET, reason)


async def test_a_prompt_that_does_not_fit_says_so_to_whoever_asked():
    tree = await grow(lambda _: "Answer: 1\0", Budget(context=4, answer_reserve=2))
    assert tree.root.reason == "the budget's context of 4 tokens"
    call, note = spawn({"objective": "x", "context_keys": ["d"]}), "1: (out of budget: the budget's context of 400 tokens"
    program = lambda c: "Answer: ok\0" if note in c else call  # noqa: E731
    assert (await grow(program, Budget(context=400), {"d": "w" * 500})).answer == "ok"


async def test_what_the_backend_refuses_is_a_refusal():
    """Of a clone, it is a result for its parent; of the root, what became of the tree."""

    def program(context: str) -> str:
        if "long" in context and not context.startswith("T"):
            raise RefusedRequest("the prompt is too long")
        return "Answer: ok\0" if "1: (refused: the prompt is too long)" in context else spawn("long")

    tree = await grow(program)
    assert (tree.answer, tree.root.status, tree.error) == ("ok", Status.ANSWERED, "")
    tree = await Runtime(ScriptedPolicy(program), PlainFormat()).run(task("long"), Budget(depth=0))
    assert (tree.answer, tree.root.status, tree.error) == (None, Status.REFUSED, "the prompt is too long")


class Greedy(ScriptedPolicy):
    """Returns more than it was granted."""

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        ids = tuple(range(1, request.max_tokens + 4))
        return Sample(ids, (0.0,) * len(ids), StopReason.LENGTH, len(request.prompt) + 100, 0, 0)


async def test_a_backend_that_returns_too_much_is_charged_it_and_refused():
    tree = await Runtime(Greedy(lambda _: ""), PlainFormat()).run(task(), Budget(generated=12, prefilled=500))
    assert tree.root.status is Status.FAILED
    assert tree.error == "the backend generated 15 tokens for a grant of 12: it does not keep to max_tokens"
    assert tree.usage.generated == 15
    assert tree.usage.prefilled == len(tree.root.prompt)


class Overrunning(ScriptedPolicy):
    """Clones generate ten tokens more than they were granted, and then end as `ending` says."""

    ending = "returns"

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        if request.prompt[0] == ord("T"):
            return await ScriptedPolicy.sample(self, request, partial)
        partial.prefilled = len(request.prompt)
        for _ in range(request.max_tokens + 10):
            await anyio.sleep(1)
            partial.ids.append(1)
            partial.logprobs.append(0.0)
        if self.ending == "is reset":
            raise TransientPolicyError("connection reset")
        if self.ending == "fails":
            raise PolicyError("no such model")
        if self.ending == "hangs":
            await anyio.sleep_forever()
        return Sample(tuple(partial.ids), tuple(partial.logprobs), StopReason.LENGTH, partial.prefilled)


@pytest.mark.parametrize("ending", ["returns", "is reset", "fails", "hangs"])
@pytest.mark.parametrize("budget", [Budget(generated=600), Budget(critical_path=600, generated=5000), Budget(branch_generated=300)])
def test_a_backend_that_does_not_keep_to_max_tokens_fails_a_branch_and_not_the_run(ending: str, budget: Budget):
    """Whether the sample ends by returning, by an error, by a reset, by the deadline or because somebody cancels it."""
    roots: list[Growth] = []
    policy = Overrunning(lambda c: "Answer: ok\0" if "1: " in c else spawn({"objective": "a", "max_tokens": 50}, "b"))
    policy.ending = ending

    async def main() -> Tree:
        limited = budget.model_copy(update={"seconds": 5000.0})
        return await Runtime(policy, PlainFormat(), max_turn_tokens=400, watch=roots.append).run(task(), limited)

    tree = simulate(main, 0)
    ledger = roots[0].ledger
    ledger.check()
    clones = tree.root.clones
    granted = [50, clones[1].generated - 10]
    assert [clone.generated for clone in clones] == [60, granted[1] + 10] and granted[1] > 50
    assert tree.usage.generated == sum(branch.generated for branch in tree.branches) == ledger.spent("generated")
    assert tree.usage.critical_path == ledger.spent("critical_path")
    if ending == "hangs":
        assert tree.root.status is Status.TIMED_OUT
    else:
        assert {clone.status for clone in clones} == {Status.FAILED}
        assert "max_tokens" in clones[0].reason or ending == "fails"
        assert tree.answer == "ok" or tree.root.status is Status.FAILED


async def test_width_and_clones_may_be_used_up():
    def program(context: str) -> str:
        return "Answer: 1\0" if not context.startswith("T") or "1: " in context else spawn("a", "b", "c")

    for budget in (Budget(width=3), Budget(clones=3), Budget(width=3, clones=3)):
        tree = await grow(program, budget)
        assert [clone.status for clone in tree.root.clones] == [Status.ANSWERED] * 3
    assert len((await grow(program, Budget(clones=2))).root.clones) == 2


async def test_a_clones_messages_are_its_system_prompt_and_its_objective():
    class Remembering(PlainFormat):
        rendered: ClassVar[list[list[Message]]] = []

        def render(self, messages: Sequence[Message], tools: Schemas) -> list[int]:
            self.rendered.append(list(messages))
            return super().render(messages, tools)

    policy = ScriptedPolicy(lambda c: spawn("add") if "root" in c and "1: " not in c else "Answer: 1\0")
    for system, before in (("", []), ("be brief", [Message("system", "be brief")])):
        await Runtime(policy, Remembering(), clone_system=system).run(task("root"), Budget())
        assert Remembering.rendered[-1] == [*before, Message("user", "add")]


async def test_a_branch_that_runs_out_is_told_in_these_words():
    """After a cut turn, with what the reserve has left; before the first turn, in the prompt."""
    notice = f"{OUT_OF_BUDGET_NOTICE}\n{left_line(8, None)}"
    tree = await grow(lambda c: "Answer: 1\0" if OUT_OF_BUDGET_NOTICE in c else "y" * 50, Budget(generated=20, answer_reserve=8))
    first, last = tree.root.turns
    assert list(first.appended) == PlainFormat().after_turn(notice, closed=False)
    assert (len(first.sampled), len(last.sampled), last.appended) == (12, 8, ())
    tree = await grow(lambda c: "1\0", Budget(generated=8, answer_reserve=8))
    plain = PlainFormat().render([Message("user", f"root\n{left_line(0, None)}")], [tool_schema()])
    assert list(tree.root.prompt) == [*plain, *PlainFormat().after_turn(notice, closed=False)]


async def test_results_come_back_in_these_words():
    tree = await grow(
        lambda c: "Answer: 5\0" if not c.startswith("T") or "1: " in c else spawn({"objective": "a", "context_keys": ["p", "q"]}),
        Budget(generated=500, clones=4),
    )
    (clone,) = tree.root.clones
    left = 500 - len(tree.root.turns[0].sampled) - len(clone.turns[0].sampled)
    left_text = f"Unknown context keys: p, q\n{left_line(left, 3)}"
    expected = PlainFormat().after_turn(render_results([CloneResult(Status.ANSWERED, "5")], left_text, 4000), closed=True)
    assert list(tree.root.turns[0].appended) == expected


@pytest.mark.parametrize("slack", range(-3, 4))
async def test_a_notice_and_an_answer_are_given_the_context_that_is_kept_for_them(slack: int):
    """The context holds the prompt, the notice, the answer's four tokens, and `slack` more."""
    notice = PlainFormat().after_turn(OUT_OF_BUDGET_NOTICE, closed=False)
    prompt = list((await grow(lambda _: "1\0")).root.prompt)
    tree = await grow(lambda c: "z" * 500, Budget(context=len(prompt) + len(notice) + 4 + slack, answer_reserve=4))
    assert tree.root.status is Status.OUT_OF_BUDGET
    assert [len(turn.sampled) for turn in tree.root.turns] == ([slack, 4] if slack > 0 else [4 + slack])
    assert list(tree.root.ids)[: -len(tree.root.turns[-1].sampled)] == [*prompt, *map(ord, "z" * slack), *notice]
    tree = await grow(lambda c: "z" * 500, Budget(context=len(prompt) + len(notice), answer_reserve=4))
    assert (tree.root.turns, tree.root.status) == ((), Status.OUT_OF_BUDGET), "a notice without room for an answer is not given"
    assert tree.root.reason == f"the budget's context of {len(prompt) + len(notice)} tokens"
    assert tree.starved == f"a prompt of {len(prompt)} tokens leaves nothing of {tree.root.reason}"


def test_a_broken_ledger_is_noticed():
    for currency, spent, held in (("generated", 11, 0), ("generated", 5, 6), ("prefilled", -1, 0), ("prefilled", 0, -1)):
        ledger = Ledger.for_root(Budget(generated=10))
        ledger.check()
        ledger._spent[currency], ledger._held[currency] = spent, held
        with pytest.raises(LedgerError, match=rf"^{currency}: spent {spent} \+ reserved {held} against a limit of"):
            ledger.check()


async def test_one_clone_and_one_at_a_time_are_offered():
    def program(context: str) -> str:
        return "Answer: 1\0" if not context.startswith("T") or "1: " in context else spawn("a")

    for budget in (Budget(clones=1), Budget(width=1), Budget(depth=1)):
        assert (await grow(program, budget)).usage.clones == 1
    for budget in (Budget(clones=0), Budget(width=0), Budget(depth=0)):
        assert (await grow(lambda c: "Answer: " + c[0] + "\0", budget)).answer == "-"


async def test_a_branch_that_cannot_read_its_prompt_says_which_currency_it_lacks():
    tree = await grow(lambda _: "Answer: 1\0", Budget(prefilled=3))
    assert (tree.root.status, tree.root.reason, tree.root.turns) == (Status.OUT_OF_BUDGET, "prefilled", ())


@pytest.mark.parametrize("room", [1, 5])
async def test_without_a_reserve_a_branch_uses_all_of_its_context_and_is_told_nothing(room: int):
    prompt = len((await grow(lambda _: "1\0")).root.prompt)
    tree = await grow(lambda _: "z" * 500, Budget(context=prompt + room))
    assert [len(turn.sampled) for turn in tree.root.turns] == [room]
    assert tree.root.turns[0].appended == ()
    tree = await grow(lambda _: "z" * 500, Budget(generated=room))
    assert [len(turn.sampled) for turn in tree.root.turns] == [room]
    assert tree.root.turns[0].appended == ()


async def test_the_last_turn_is_not_followed_by_a_notice():
    """Out of turns, or with nothing left in the reserve, there is nobody to tell."""
    tree = await grow(lambda _: "z" * 500, Budget(turns=1, answer_reserve=4, generated=50))
    assert [(len(turn.sampled), turn.appended) for turn in tree.root.turns] == [(46, ())]
    tree = await grow(lambda c: "Answer: 2\0" if "Out" in c else "z" * 500, Budget(turns=2, answer_reserve=10, generated=50))
    assert [len(turn.sampled) for turn in tree.root.turns] == [40, 10]
    assert tree.answer == "2"
    tree = await grow(lambda c: "z\0" if "Out" in c else "z" * 500, Budget(answer_reserve=1, generated=50))
    assert [len(turn.sampled) for turn in tree.root.turns] == [49, 1], "one token is enough to be told"


async def test_refusals_in_these_words():
    for turn, answer in (
        (spawn("x"), "refused: spawn_clone is not available here; answer yourself"),
        (spawn("x")[:-1] * 2 + "\0", "refused: one call a turn: put all objectives into one call"),
    ):
        budget = Budget(depth=0) if "not available" in answer else Budget()
        tree = await grow(lambda c, turn=turn: "Answer: 1\0" if "refused" in c else turn, budget)
        refusal = render_results([CloneResult(Status.REFUSED, reason=answer.removeprefix("refused: "))], "", 4000)
        assert list(tree.root.turns[0].appended) == PlainFormat().after_turn(refusal, closed=True)


async def test_clones_are_not_given_what_their_parent_needs_to_read_again():
    """Of 1,000 tokens to read, the parent keeps its context twice: once to go on, once for results as long."""

    def program(context: str) -> str:
        return "Answer: 1\0" if not context.startswith("T") or "1: " in context else spawn("a", "b")

    ledgers: list[int | None] = []

    class Watching(ScriptedPolicy):
        async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
            ledgers[:] = [clone.ledger.left("prefilled") for clone in root[0].clones] or ledgers
            return await super().sample(request, partial)

    root: list[Growth] = []
    tree = await Runtime(Watching(program), PlainFormat(), watch=root.append).run(task(), Budget(prefilled=1000))
    read = len(tree.root.prompt)
    context = read + len(tree.root.turns[0].sampled)
    own = len(tree.root.clones[0].prompt)
    assert max(left for left in ledgers if left is not None) in ((1000 - read - 2 * context) // 2, (1000 - read - 2 * context) // 2 - own)
    assert tree.root.status is Status.ANSWERED


async def test_results_that_do_not_fit_end_the_branch_or_its_reserve_answers():
    def program(context: str) -> str:
        if not context.startswith("T"):
            return "Answer: " + "9" * 300 + "\0"
        return "Answer: 3\0" if "Out of" in context else spawn("a")

    first = await grow(program)
    used = len(first.root.prompt) + len(first.root.turns[0].sampled)
    tree = await grow(program, Budget(context=used + 2))
    assert (tree.root.status, tree.root.reason) == (Status.OUT_OF_BUDGET, "context")
    notice = PlainFormat().after_turn(OUT_OF_BUDGET_NOTICE, closed=True)
    tree = await grow(program, Budget(context=used + len(notice) + 10 + 1, answer_reserve=10))
    assert tree.root.status is Status.OUT_OF_BUDGET
    assert tree.answer == "3"
    assert list(tree.root.turns[0].appended) == notice


async def test_a_watched_branch_can_be_cancelled_alone():
    roots: list[Growth] = []

    def program(context: str) -> str:
        if context.startswith("T"):
            return "Answer: up\0" if "1: " in context else spawn("slow", "quick")
        return "y" * 5000 if "slow" in context else "Answer: 1\0"

    policy = ScriptedPolicy(program, delay=0.001)
    trees: list[Tree] = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            trees.append(await Runtime(policy, PlainFormat(), watch=roots.append).run(task(), Budget()))

        group.start_soon(run)
        while not roots or not roots[0].clones or roots[0].clones[1].status is None:
            await anyio.sleep(0.001)
        roots[0].clones[0].cancel()
    (tree,) = trees
    assert [clone.status for clone in tree.root.clones] == [Status.CANCELLED, Status.ANSWERED]
    assert tree.answer == "up"
    Growth("0", (), Ledger.for_root(Budget())).cancel()  # not watched: nothing to cancel, and no error
