"""The nano base: demonstrations that are true and prefer nothing, and shipped weights that do what the docs say."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import defaultdict

import anyio
import pytest
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.context import ContextStore
from ramet.agents.protocol import extract_answer, parse_call
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.env.arithmetic import RowsEnvironment, parse_sum
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.recipes.nano.demonstrations import LONGEST, RESULTS, WINDOW, demonstrate, digit_terms, encode
from ramet.recipes.nano.pretrain import PretrainConfig, pretrain
from ramet.rewards.exact_match import integer_match


@pytest.fixture(scope="module")
def demonstrations():
    rng = random.Random(0)
    return [demonstrate(rng) for _ in range(6000)]


def rows(demonstration) -> dict[str, list[int]]:
    lines = demonstration.prompt.partition("\nsum\n")[0].splitlines()
    return {line.partition(": ")[0]: parse_sum(line.partition(": ")[2]) for line in lines}


def test_every_equation_is_true_and_every_full_answer_right(demonstrations):
    answered = 0
    for demonstration in demonstrations:
        total = sum(v for row in rows(demonstration).values() for v in row)
        said = [piece for piece in demonstration.pieces if not piece.context]
        for piece in said:
            for left, right in re.findall(r"^(.+)=(-?\d+)$", piece.text, re.MULTILINE):
                assert sum(parse_sum(left)) == int(right)
        if said[-1].closed and all(piece.closed for piece in said):
            assert extract_answer(said[-1].text) == str(total)
            answered += 1
    assert answered > len(demonstrations) / 2


def test_calls_cover_every_row_once(demonstrations):
    calls = [d for d in demonstrations if d.pieces[0].call]
    for demonstration in calls:
        keys = [key for request in parse_call(demonstration.pieces[0].call).requests(ContextStore({}))[0] for key in request.context_keys]
        assert keys == list(rows(demonstration))
        assert len(parse_call(demonstration.pieces[0].call).objectives) <= RESULTS


def test_no_length_prefers_a_strategy(demonstrations):
    """Offered the tool, half delegate at every length; never without it. Long sums are only begun alone."""
    share = defaultdict(list)
    for demonstration in demonstrations:
        count = sum(map(len, rows(demonstration).values()))
        delegates = demonstration.pieces[0].call is not None
        assert demonstration.tools or not delegates
        if demonstration.tools:
            share[(count - 1) // WINDOW].append(delegates)
        if not delegates and count > WINDOW:
            equations = [line.partition("=")[0] for line in demonstration.pieces[0].text.splitlines() if "=" in line]
            taken = [term for left in equations for term in parse_sum(left)[1:]]
            values = [v for row in rows(demonstration).values() for v in row]
            shown = [term for value in values[1:WINDOW] for term in digit_terms(value)]
            assert taken == shown[: len(taken)] and not demonstration.pieces[0].closed
    assert len(share) == LONGEST // WINDOW
    for delegating in share.values():
        half_width = 4 * (0.25 / len(delegating)) ** 0.5
        assert abs(sum(delegating) / len(delegating) - 0.5) < half_width


@pytest.mark.parametrize(("value", "terms"), [(0, [0]), (7, [7]), (-16, [-10, -6]), (20, [20]), (-105, [-100, -5])])
def test_terms_are_digits_in_their_places(value, terms):
    assert digit_terms(value) == terms


def test_an_equation_takes_in_one_digit(demonstrations):
    """Nothing but the strategy is left to choose."""
    for demonstration in demonstrations:
        for piece in demonstration.pieces:
            for left, _ in [] if piece.context else re.findall(r"^(.+)=(-?\d+)$", piece.text, re.MULTILINE):
                (taken,) = parse_sum(left)[1:]
                assert digit_terms(taken) == [taken]


def test_a_turn_that_is_cut_has_no_end_to_train(demonstrations, nano_tokenizer):
    chat = ControlTokenFormat(nano_tokenizer)
    end = chat._id["<|end|>"]
    for demonstration in demonstrations[:500]:
        ids, mask = encode(demonstration, chat)
        assert len(ids) == len(mask)
        trained_ends = sum(m and i == end for i, m in zip(ids, mask, strict=True))
        assert trained_ends == sum(piece.closed for piece in demonstration.pieces if not piece.context)


def test_training_is_a_function_of_the_seed():
    torch.set_num_threads(1)
    config = PretrainConfig(layers=1, width=32, heads=2, feed_forward=32, steps=3, batch_tokens=512)
    losses = []
    weights = []
    for seed in (0, 0, 1):
        seen: list[float] = []
        _, model = pretrain(PretrainConfig(**{**config.__dict__, "seed": seed}), lambda _, loss, __: seen.append(loss))  # noqa: B023
        losses.append(seen)
        weights.append([p.detach() for p in model.parameters()])
    assert losses[0] == losses[1] != losses[2]
    assert all(map(torch.equal, weights[0], weights[1]))


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return load_model(BASE)


def accuracy(base, operands: int, depth: int, tasks: int = 40) -> tuple[float, float]:
    model, _, chat = base

    async def main() -> tuple[float, float]:
        right = spawned = 0
        drawn = RowsEnvironment((operands, operands)).tasks("iid", tasks, 0)
        async with HFPolicy(model) as policy:
            jobs = [Job(task, Budget(generated=400, depth=depth, answer_reserve=8), i) for i, task in enumerate(drawn)]
            async with Runtime(policy, chat, Sampling(temperature=1.0 if depth else 0.0)).run_many(jobs) as trees:
                async for job, tree in trees:
                    right += integer_match(job.task, tree.answer) == 1.0
                    spawned += tree.spawned
        return right / tasks, spawned / tasks

    return anyio.run(main)


def test_the_shipped_base_is_right_on_short_sums_and_lost_on_long_ones(base):
    assert accuracy(base, 4, depth=0)[0] >= 0.9
    assert accuracy(base, 16, depth=0)[0] <= 0.2


def test_the_shipped_base_has_no_preference(base):
    for operands in (3, 8, 16):
        assert 0.25 <= accuracy(base, operands, depth=1)[1] <= 0.75


def test_the_shipped_base_is_the_recipes():
    assert json.loads((BASE / "pretrain.json").read_text()) == dataclasses.asdict(PretrainConfig())


def test_the_shipped_base_is_small():
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 10 * 2**20
