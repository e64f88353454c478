"""Methods for questions in words keep their budgets and do what they say; what a sweep says equals a slow way of counting it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
import pytest
from typer.testing import CliRunner

from ramet.agents import programs
from ramet.agents.budget import Budget
from ramet.agents.journal import Journal
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest, Sampling
from ramet.agents.tree import StopReason, Task
from ramet.benchmarks.evaluation import frontier, methods
from ramet.benchmarks.evaluation.baselines import Outcome
from ramet.benchmarks.evaluation.harness import Backend, Measured, MethodEntry, Workload, grouped, measure
from ramet.cli.main import app
from ramet.env import instructions
from ramet.env.multihop import MultihopEnvironment
from ramet.errors import ConfigError, TransientPolicyError
from ramet.policy.engines.openai import WireFormat
from ramet.policy.models.catalogue import BASE
from ramet.runs.settings import RunConfig
from ramet.runs.sweep import entries, latex, price_table, table, tuned

CALL = '<tool_call>{"name": "spawn_clone", "arguments": {"objectives": [{"objective": "who?", "context_keys": ["Hall 1"]}]}}</tool_call>'


@pytest.fixture
def env(tmp_path) -> MultihopEnvironment:
    rows = []
    for n in range(6):
        titles = [f"Hall {n}", *(f"Filler {n}.{i}" for i in range(7)), f"Ann {n}"]
        texts = [f"Hall {n} was built by Ann {n}.", *(f"Sheep graze on hill {i}." for i in range(7)), f"Ann {n} lived in Ghent{n}."]
        rows.append(
            {
                "id": n, "question": f"Where did the builder of Hall {n} live?", "answer": f"Ghent{n}",
                "supporting_facts": [[f"Hall {n}", 0], [f"Ann {n}", 0]], "context": [[t, [x]] for t, x in zip(titles, texts, strict=True)],
            }
        )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MultihopEnvironment({"iid": str(path)}, name="hotpotqa")


class Says:
    """A policy that says a text, in pieces of three characters, one id each; what it was asked is kept."""

    version = 0
    context = None

    def __init__(self, wire: WireFormat, text: Callable[[str, SampleRequest], str]):
        self.wire, self.text, self.asked = wire, text, list[SampleRequest]()

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        await anyio.lowlevel.checkpoint()
        self.asked.append(request)
        said = self.text(self.wire.text(request.prompt), request)
        ids = tuple(self.wire.piece(said[i : i + 3]) for i in range(0, len(said), 3))
        stop = StopReason.END if len(ids) <= request.max_tokens else StopReason.LENGTH
        ids = ids[: request.max_tokens]
        return Sample(ids, (-1.0,) * len(ids), stop, len(request.prompt), 0)


def answer(env, method, text, generated=200, task=0, seed=0) -> tuple[Outcome, Says, Task]:
    wire = WireFormat()
    policy = Says(wire, text)
    chosen = env.tasks("iid", 6, 0)[task]
    outcome = anyio.run(method, Runtime(policy, wire), chosen, Budget(generated=generated, answer_reserve=8), seed)
    return outcome, policy, chosen


def all_methods(env) -> dict[str, methods.BudgetedMethod]:
    return {
        "direct": methods.instructed_tree(instructions.DIRECT), "cot": methods.instructed_tree(instructions.COT),
        "delegate": methods.instructed_tree(instructions.DELEGATE),
        "self_consistency": methods.self_consistency(env, 4), "best_of_n": methods.best_of_n(4),
        "map_reduce": methods.map_reduce(3), "retrieve": methods.retrieve(env, 2),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["direct", "cot", "delegate", "self_consistency", "best_of_n", "map_reduce", "retrieve"])
@pytest.mark.parametrize("generated", [1, 9, 40, 200])
def test_every_method_keeps_its_budget_and_counts_what_was_spent(env, name, generated):
    rng = random.Random(f"{name}{generated}")
    spent: list[int] = []

    def text(prompt: str, request: SampleRequest) -> str:
        said = "thinking " * rng.randint(0, 30) + rng.choice([CALL, "Answer: Ghent0", "Answer:", "no idea"])
        spent.append(min(-(-len(said) // 3), request.max_tokens))
        return said

    outcome, _, _ = answer(env, all_methods(env)[name], text, generated)
    assert outcome.generated == sum(spent) <= generated
    assert outcome.critical_path <= outcome.generated


def test_what_each_method_reads(env):
    said = lambda prompt, request: "Answer: x"  # noqa: E731
    for name, method in all_methods(env).items():
        _, policy, task = answer(env, method, said)
        prompts = [policy.wire.text(r.prompt) for r in policy.asked]
        question = task.meta["question"]
        if name == "map_reduce":
            *parts, last = prompts
            assert len(parts) == 3 and "Notes on documents:\n1: x\n2: x\n3: x" in last and question in last
            for key, value in task.documents.items():
                assert sum(f"{key}: {value}" in part for part in parts) == 1
        elif name == "retrieve":
            assert all(f"{key}: " in prompts[0] for key in task.meta["supporting"]) and "Sheep" not in prompts[0]
        else:
            assert all(all(f"{key}: {value}" in p for key, value in task.documents.items()) and question in p for p in prompts)
        assert len(prompts) == {"self_consistency": 4, "best_of_n": 4, "map_reduce": 4}.get(name, 1)
    *_, task = answer(env, methods.instructed_tree("x"), said)
    supporting = set(task.meta["supporting"])
    assert set(methods.ranked(task, 2)) == supporting and len(methods.ranked(task, 100)) == len(task.documents)


def test_votes_count_equal_answers_as_one_and_scores_choose(env):
    answers = iter(["Answer: The Paris", "Answer: Rome", "Answer: paris.", "no\nAnswer:"])
    outcome, _, _ = answer(env, methods.self_consistency(env, 4), lambda p, r: next(answers))
    assert outcome.answer == "The Paris"
    answers = iter(["Answer: a", "Answer: bbb", "Answer: cc", "Answer:"])
    longest = methods.best_of_n(4, lambda task, tree, said: len(said))
    assert answer(env, longest, lambda p, r: next(answers))[0].answer == "bbb"
    assert answer(env, methods.self_consistency(env, 4), lambda p, r: "Answer:")[0].answer is None


def test_delegation_gives_documents_by_key_and_reports_which(env):
    def text(prompt: str, request: SampleRequest) -> str:
        if "You are a clone" in prompt:
            assert "Hall 1: Hall 1 was built by Ann 1." in prompt and "Sheep" not in prompt
            return "Answer: Ann 1"
        return "Answer: Ghent1" if CALL in prompt and "1: Ann 1" in prompt.partition(CALL)[2] else CALL

    at = [t.meta["question"] for t in env.tasks("iid", 6, 0)].index("Where did the builder of Hall 1 live?")
    outcome, _, task = answer(env, methods.instructed_tree(instructions.DELEGATE), text, task=at)
    assert outcome.answer == "Ghent1" and outcome.spawned and outcome.recall == 0.5 and env.grade(task, outcome.answer) == 1.0


def test_prompt_tokens_do_not_depend_on_what_ran_before(env, tmp_path):
    """A backend that claims to have cached everything changes nothing; samples of one outcome share their prompt."""
    wire = WireFormat()

    class Warm(Says):
        async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
            sample = await super().sample(request, partial)
            return replace(sample, prefilled=1, cached=len(request.prompt) - 1)

    tasks = env.tasks("iid", 2, 0)

    async def run(policy: Says, name: str) -> list[Measured]:
        with Journal(tmp_path / name, name) as journal:
            entry = MethodEntry("sc", methods.self_consistency(env, 3), Sampling(0.0), 0)
            workload = Workload("iid", tasks, [72, 90], Budget(), 0, repeats=2)
            return await measure(entry, env, workload, Backend(policy, wire), journal)

    said = lambda p, r: "Answer: x"  # noqa: E731
    cold, warm = (anyio.run(run, kind(wire, said), kind.__name__) for kind in (Says, Warm))
    assert cold == warm and len(cold) == 8
    assert len({(m.budget, m.task, m.repeat) for m in cold}) == 8
    for m in cold:
        # Three samples of one prompt of n tokens: it is computed once, and its last token for the others.
        n = m.outcome.prefilled - 2
        assert m.outcome.cached == 2 * (n - 1)


def test_a_refused_attempt_has_read_nothing(env, tmp_path):
    """What a server refused is computed by the attempt that it takes."""
    wire = WireFormat()

    class Refuses(Says):
        refused = False

        async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
            if not self.refused:
                self.refused = True
                raise TransientPolicyError("429", 0.0)
            return await super().sample(request, partial)

    async def run(policy: Says, name: str) -> list[Measured]:
        with Journal(tmp_path / name, name) as journal:
            entry = MethodEntry("d", methods.instructed_tree(instructions.DIRECT), Sampling(0.0), 0)
            workload = Workload("iid", env.tasks("iid", 2, 0), [60], Budget(), 0)
            return await measure(entry, env, workload, Backend(policy, wire, in_flight=1), journal)

    said = lambda p, r: "Answer: x"  # noqa: E731
    assert anyio.run(run, Refuses(wire, said), "a") == anyio.run(run, Says(wire, said), "b")


def test_small_budgets_make_fewer_contexts_not_useless_ones(env):
    said = lambda prompt, request: "Answer: x"  # noqa: E731
    for generated, samples, parts in ((10, 1, 1), (50, 2, 1), (64, 2, 1), (96, 4, 2), (400, 4, 3)):
        assert len(answer(env, methods.self_consistency(env, 4), said, generated)[1].asked) == samples
        outcome, policy, task = answer(env, methods.map_reduce(3), said, generated)
        assert outcome.clones == parts
        read = "".join(policy.wire.text(r.prompt) for r in policy.asked[:-1])
        assert all(read.count(f"{key}: {value}") == 1 for key, value in task.documents.items()), "every document is read once"


def fake(rng: random.Random, policies: int, tasks: int) -> list[Measured]:
    made = []
    for p in range(policies):
        for budget in (10, 20, 40, 80):
            for t in range(tasks):
                spent = rng.randint(1, budget)
                outcome = Outcome(None, spent, spent, 2 * spent, False, 0, "answered")
                made.append(Measured(f"p{p}", "iid", budget, f"t{t}", 0, float(rng.random() < 0.2 + budget / 200), outcome))
    return made


@pytest.mark.parametrize("seed", range(20))
def test_matched_costs_and_areas_equal_a_slow_count(seed):
    rng = random.Random(seed)
    groups = grouped(fake(rng, 3, rng.randint(2, 30)))
    mean = lambda ms, name: sum(getattr(m.outcome, name) for m in ms) / len(ms)  # noqa: E731
    accuracy = lambda ms: sum(m.score for m in ms) / len(ms)  # noqa: E731
    for record in frontier.matched(groups, "p0"):
        theirs = groups[record["baseline"], "iid", record["budget"]]
        allowed = [b for b in (10, 20, 40, 80) if mean(groups["p0", "iid", b], "generated") <= mean(theirs, "generated")]
        if not allowed:
            assert record["difference"] is None and record["winner_cost"] is None
            continue
        assert record["winner_budget"] == max(allowed)
        ours = groups["p0", "iid", max(allowed)]
        assert record["difference"] == pytest.approx(accuracy(ours) - accuracy(theirs))
        assert record["ci_low"] <= record["difference"] <= record["ci_high"]
        assert record["winner_cost"] <= record["baseline_cost"]
    most = max(mean(ms, "prefilled") for ms in groups.values())
    for record in frontier.areas(groups, "prefilled"):
        points = [(mean(ms, "prefilled"), accuracy(ms)) for (p, _, _), ms in groups.items() if p == record["policy"]]
        grid = np.linspace(0, most, 200_001)
        best = np.zeros_like(grid)
        for cost, value in points:
            best = np.where(grid >= cost, np.maximum(best, value), best)
        assert record["area"] == pytest.approx(best[:-1].mean(), abs=1e-4)
        assert record["ci_low"] <= record["ci_high"] <= 1 and math.isclose(record["most"], most)


def test_prices():
    outcome = Outcome(None, 1_000_000, 1, 500_000, False, 0, "answered", cached=2_000_000)
    assert frontier.money(outcome, price_table(["generated=0.6", "prefilled=0.15", "cached=0.01"])) == pytest.approx(0.6 + 0.075 + 0.02)
    for bad in ("generated", "generated=x", "tokens=1", "generated=-1", "generated=inf"):
        with pytest.raises(ConfigError, match="--price"):
            price_table([bad])


def test_frontier_from_the_command_line(tmp_path, env):
    """The whole command on the shipped model, which has never seen words: what it writes is whole, and it resumes."""
    out = tmp_path / "f.json"
    arguments = [
        "frontier", "--policy", str(BASE), "--env", "hotpotqa", "--data", env.sources["iid"], "--limit", "2", "--budgets", "8,16",
        "--methods", "direct,self_consistency,map_reduce,retrieve,delegate", "--price", "generated=1", "--runs", str(tmp_path),
        "--name", "f", "--set", "budget.answer_reserve=2", "--set", "threads=1", "--widths", "1,2", "--json", str(out),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    records = json.loads(out.read_text())
    points = [r for r in records if r["record"] == "point"]
    names = {"direct", "self_consistency", "map_reduce", "retrieve", "delegate width 1", "delegate width 2"}
    assert {p["method"] for p in points} == names and {p["metric"] for p in points} == {"em", "f1"}
    assert {p["model"] for p in points} == {str(BASE)}
    assert len(points) == 2 * 2 * 6 and all(p["env"] == "hotpotqa" and p["n"] == 2 and p["generated"] <= p["budget"] for p in points)
    assert {r["record"] for r in records} >= {"meta", "point", "comparison", "matched", "area"}
    folder = tmp_path / "f"
    assert table(records).count("\n") == len(points) + 1 == (folder / "results.csv").read_text().count("\n")
    assert latex(records) == (folder / "results.tex").read_text() and latex(records).count(r"\begin{tabular}") == 2
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "</script" in page
    assert (folder / "frontier.png").stat().st_size > 10_000
    before = (folder / "journal.jsonl").read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (folder / "journal.jsonl").read_bytes() == before
    other = CliRunner().invoke(app, [*arguments[:8], "3", *arguments[9:]])
    assert other.exit_code != 0 and "another configuration" in str(other.exception)


def test_trained_weights_are_compared_with_votes_over_themselves_and_settings_are_chosen_on_tasks_of_their_own(tmp_path, env):
    rows = [json.loads(line) for line in Path(env.sources["iid"]).read_text().splitlines()]
    train = [{**rows[0], "question": f"{rows[0]['question']} And {n}?", "_id": f"t{n}"} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    arguments = [
        "frontier", "--policy", str(BASE), "--env", "hotpotqa", "--data", env.sources["iid"], "--limit", "2", "--budgets", "60",
        "--methods", "self_consistency,map_reduce", "--runs", str(tmp_path), "--name", "f", "--set", "budget.answer_reserve=2",
        "--set", "threads=1", "--set", f"env.train={tmp_path / 'train.jsonl'}", "--tune", "2", "--trained", str(BASE),
        "--json", str(tmp_path / "f.json"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    records = json.loads((tmp_path / "f.json").read_text())
    methods_ = {r["method"] for r in records if r["record"] == "point"}
    own = {"trained", "trained, never delegates", "self_consistency (trained)", "map_reduce (trained)"}
    assert methods_ == {"self_consistency", "map_reduce", *own}
    chosen = {(r["weights"], r["method"]): r["count"] for r in records if r["record"] == "choice"}
    assert chosen["base", "map_reduce"] in (1, 3, 5) and chosen["trained", "self_consistency"] in (2, 4, 8)


@pytest.mark.parametrize(("given", "said"), [(0.0, [0.7, 0.7, 0.0, 0.0]), (0.3, [0.3] * 4)])
def test_the_temperature_of_a_choice_is_the_one_that_is_sampled_at(tmp_path, env, given, said):
    config = RunConfig.model_validate({"model": "nano", "eval": {"temperature": given}, "env": {"kind": "hotpotqa"}})
    with Journal(tmp_path / "j", "job") as journal:
        settings = tuned([], config, env, BASE, 0, programs.likelihood, journal, "")
    assert [setting.temperature for setting in settings.values()] == said
    made = entries(list(settings), config, env, settings=settings)
    assert [entry.sampling.temperature for entry in made] == said


def test_what_cannot_be_measured_is_named(tmp_path, env):
    def run(*arguments: str) -> str:
        return str(CliRunner().invoke(app, ["frontier", "--policy", str(BASE), "--runs", str(tmp_path), *arguments]).exception)

    assert "no method magic" in run("--env", "hotpotqa", "--data", env.sources["iid"], "--methods", "magic")
    assert "env.kind" in run("--env", "chess")
    assert "env.data names no" in run("--env", "hotpotqa")
    assert "for rows there is" in run("--env", "rows", "--methods", "cot")
    assert "need documents" in run("--env", "gsm8k", "--data", "x.jsonl", "--methods", "cot,retrieve")
    server = ("--set", "backend=completions", "--set", "url=http://127.0.0.1:9/v1")
    assert "that it has loaded" in run("--env", "hotpotqa", "--data", env.sources["iid"], "--trained", str(BASE), *server)
