"""Measuring: what one task cannot have done is recorded as such, and costs no other task its result."""

from __future__ import annotations

import itertools
import operator
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from ramet.agents.budget import Budget
from ramet.agents.drain import draining
from ramet.agents.journal import Journal
from ramet.agents.prefixes import Prefixes
from ramet.agents.sampling import Sampling
from ramet.agents.scripted import PlainFormat, ScriptedPolicy
from ramet.agents.transcripts import TREES, Transcripts, read_transcripts
from ramet.agents.tree import Message, Task
from ramet.benchmarks.evaluation import baselines
from ramet.benchmarks.evaluation.harness import (
    Backend,
    Measured,
    MethodEntry,
    Workload,
    failures,
    forget_unfinished,
    grouped,
    measure,
    point,
)
from ramet.errors import Drained, PolicyError, RefusedRequest, TaskError, TransientPolicyError


class Env:
    """Tasks whose answer is their text."""

    splits = ("iid",)
    metrics = ("accuracy",)

    def tasks(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task(f"t{i}", (Message("user", f"say {i}."),), {}, str(i)) for i in range(count)]

    def grade(self, task: Task, answer: str | None, metric: str | None = None) -> float:
        return float(answer == task.reference)

    def size(self, task: Task) -> int:
        return 1


def run(
    policy: ScriptedPolicy,
    path: Path,
    budgets: tuple[int, ...] = (60,),
    in_flight: int = 2,
    method: baselines.BudgetedMethod = baselines.tree,
) -> list[Measured]:
    env, entry = Env(), MethodEntry("base", method, Sampling(), 0)
    transcripts = Transcripts(path.with_name(TREES))

    async def main() -> list[Measured]:
        with Journal(path, "job") as journal:
            workload = Workload("iid", env.tasks("iid", 6, 0), budgets, Budget(), 0)
            forget_unfinished(transcripts, journal)
            backend = Backend(policy, PlainFormat(), in_flight, always_show_budget=False)
            return await measure(entry, env, workload, backend, journal, transcripts=transcripts)

    return anyio.run(main)


def saying(unless: dict[str, Exception] | None = None) -> Callable[[str], str]:
    """Answers rightly, unless a task is in `unless`."""

    def program(context: str) -> str:
        said = context.partition("say ")[2].partition(".")[0]
        if unless and said in unless:
            raise unless[said]
        return f"Answer: {said}\0"

    return program


def test_a_task_that_the_backend_refuses_is_recorded_and_the_rest_is_measured(tmp_path):
    found = run(ScriptedPolicy(saying({"2": RefusedRequest("a prompt of 9000 tokens is too long")})), tmp_path / "j", (60, 90))
    assert [m.failed for m in found if m.task == "t2"] == ["task t2: a prompt of 9000 tokens is too long"] * 2
    groups = grouped(found)
    assert [(point(ms)["n"], point(ms)["accuracy"]) for ms in groups.values()] == [(5, 1.0)] * 2
    assert [(r["task"], r["budget"]) for r in failures(found)] == [("t2", 60), ("t2", 90)]
    # The next run goes on past it, without asking again.
    policy = ScriptedPolicy(saying())
    assert run(policy, tmp_path / "j", (60, 90)) == found and not policy.requests


def places(path: Path) -> list[tuple]:
    kept = read_transcripts(path.with_name(TREES))
    return sorted((k.place["budget"], k.task, k.place["number"], k.reward.get("score"), k.error) for k in kept)


def test_the_trees_of_every_outcome_are_kept_with_its_score_or_its_error(tmp_path):
    run(ScriptedPolicy(saying({"2": RefusedRequest("too long")})), tmp_path / "j", method=baselines.tree)
    kept = places(tmp_path / "j")
    assert [(task, score, error) for _, task, number, score, error in kept if number == 0] == [
        (f"t{i}", None if i == 2 else 1.0, "task t2: too long" if i == 2 else "") for i in range(6)
    ]
    (first,) = (k for k in read_transcripts(tmp_path / TREES) if k.task == "t0")
    assert first.place == {"policy": "base", "split": "iid", "budget": 60, "task": "t0", "repeat": 0, "number": 0}
    assert first.reference == "0" and first.texts[0].turns == (("Answer: 0$", ""),)


@pytest.mark.parametrize("at", range(1, 7))
def test_a_kill_between_an_outcomes_trees_and_its_record_leaves_each_tree_once(tmp_path, monkeypatch, at):
    run(ScriptedPolicy(saying()), tmp_path / "whole" / "j")
    append, calls = Journal.append, itertools.count(1)

    def killed(journal: Journal, record: dict, keep: bool = True) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        append(journal, record, keep)

    with monkeypatch.context() as patched, pytest.raises(BaseException):  # noqa: B017
        patched.setattr(Journal, "append", killed)
        run(ScriptedPolicy(saying()), tmp_path / "cut" / "j")
    assert len(places(tmp_path / "cut" / "j")) >= at
    run(ScriptedPolicy(saying()), tmp_path / "cut" / "j")
    assert places(tmp_path / "cut" / "j") == places(tmp_path / "whole" / "j")


def test_a_tree_that_ends_a_run_is_kept_until_the_run_goes_on(tmp_path):
    with pytest.raises(PolicyError):
        run(ScriptedPolicy(saying({"3": PolicyError("503")})), tmp_path / "j", in_flight=1)
    assert places(tmp_path / "j")[-1][1:] == ("t3", 0, None, "task t3 failed: 503")
    run(ScriptedPolicy(saying()), tmp_path / "j")
    assert places(tmp_path / "j") == [(60, f"t{i}", 0, 1.0, "") for i in range(6)]


def test_what_one_policy_could_not_do_is_left_out_for_all(tmp_path):
    outcome = baselines.Outcome("x", 1, 1, 1, False, 0, "answered")
    found = [Measured(p, s, 60, f"t{t}", 1, 1.0, outcome) for p in ("a", "b") for s in ("iid", "ood") for t in range(3)]
    found[1] = Measured("a", "iid", 60, "t1", 1, 0.0, outcome, failed="too long")
    assert {(p, s): [m.task for m in ms] for (p, s, _), ms in grouped(found).items()} == {
        ("a", "iid"): ["t0", "t2"], ("b", "iid"): ["t0", "t2"], ("a", "ood"): ["t0", "t1", "t2"], ("b", "ood"): ["t0", "t1", "t2"],
    }  # fmt: skip
    with pytest.raises(TaskError, match="every task of iid failed: too long"):
        grouped([Measured("a", "iid", 60, "t1", 1, 0.0, outcome, failed="too long")])


def test_a_backend_that_refuses_all_ends_the_run_and_records_nothing(tmp_path):
    refusal = RefusedRequest("max_tokens is not known here")
    with pytest.raises(RefusedRequest, match="max_tokens is not known here"):
        run(ScriptedPolicy(saying({str(i): refusal for i in range(6)})), tmp_path / "j")
    assert [m.failed for m in run(ScriptedPolicy(saying()), tmp_path / "j")] == [""] * 6


def test_a_budget_that_faults_have_used_up_is_no_wrong_answer(tmp_path):
    class Wasting(ScriptedPolicy):
        async def sample(self, request, partial):
            partial.ids += [1] * request.max_tokens
            partial.logprobs += [0.0] * request.max_tokens
            raise TransientPolicyError("the stream broke")

    with pytest.raises(PolicyError, match=r"task t\d failed: the stream broke"):
        run(Wasting(saying()), tmp_path / "j")


def test_once_asked_to_stop_nothing_is_tried_again_and_the_rest_goes_on_later(tmp_path):
    """A server that never recovers: the first SIGTERM ends the run, although every task has attempts left."""
    policy = ScriptedPolicy(saying())
    asked: list[str] = []

    class Down(ScriptedPolicy):
        async def sample(self, request, partial):
            asked.append(request.group)
            if len(asked) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            if "say 0" in "".join(map(chr, request.prompt)):
                return await ScriptedPolicy.sample(self, request, partial)
            raise TransientPolicyError("503", 3000.0)

    with draining(lambda line: None), pytest.raises(Drained):
        run(Down(saying()), tmp_path / "j", in_flight=4)
    assert len(set(asked)) == len(asked) == 4
    assert [m.score for m in run(policy, tmp_path / "j")] == [1.0] * 6 and len(policy.requests) == 5


def test_shared_beginnings_are_those_of_a_slow_search():
    for seed in range(200):
        rng = random.Random(seed)
        tree, kept = Prefixes(), list[tuple[int, ...]]()
        for _ in range(40):
            base = rng.choice(kept) if kept and rng.random() < 0.7 else ()
            ids = base[: rng.randint(0, len(base))] + tuple(rng.randint(0, 2) for _ in range(rng.randint(0, 6)))
            shared = max((sum(itertools.accumulate(map(operator.eq, ids, other), operator.and_)) for other in kept), default=0)
            assert tree.add(ids) == shared
            kept.append(ids)
            if rng.random() < 0.3:
                tree.remove(kept.pop(rng.randrange(len(kept))))


def test_what_a_context_shares_costs_its_own_length_however_many_there_were():
    """Three hundred turns and ten thousand clones: a slow search would compare each with all before it, a minute long."""
    tree, ids = Prefixes(), tuple(range(2000))
    for turn in range(300):
        ids += tuple(range(turn, turn + 20))
        tree.add(ids)
    for clone in range(10_000):
        assert tree.add((*ids[:2000], -1 - clone)) == 2000
