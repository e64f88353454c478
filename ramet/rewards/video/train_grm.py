"""Training a VideoGRM: first on verdicts that were right in both orders, then by reinforcement learning on its own.

The second stage is the trainer of the delegation policy, with the same rows and the same loss: a task is a duel in one order, a
group its samples. A right verdict earns 1, and a readable one 0.5 more; what cannot be read earns nothing, and an error of ours stops the
run. Groups whose samples all earn the same teach nothing. Pairs whose video cannot be read are left out, with a warning that counts them.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ramet.agents.budget import Budget
from ramet.agents.chat import turn_end
from ramet.agents.encoding import TextEncoder
from ramet.agents.journal import fingerprint
from ramet.agents.tree import Task, Tree
from ramet.errors import RewardError, TaskError
from ramet.policy.engines.vision import VisionPolicy
from ramet.policy.training.sft import Example, SFTTraining, fine_tune
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.update import LearningProblem, Reward, TrainConfig
from ramet.rewards.video.generative import VideoGRM, pairwise
from ramet.rewards.video.judge import AnswerPair, PairwiseJudge, PairwisePrompt, compare, parse_choice
from ramet.rewards.video.pairs import PreferencePair, readable

CORRECT, VALID = 1.0, 0.5


def shown(pair: PreferencePair, forward: bool) -> PairwisePrompt:
    """A pair in one order; forward: the better answer first."""
    a, b = pair.chosen, pair.rejected[0]
    return PairwisePrompt(pair.id, pair.video, pair.question, *((a, b) if forward else (b, a)))


def sifted(judge: PairwiseJudge, pairs: Sequence[PreferencePair], k: int, seed: int) -> list[tuple[PreferencePair, bool, str]]:
    """Verdicts to learn from: of pairs that the votes of each order get right, one output of each order that does."""
    try:
        return _sifted(judge, pairs, k, seed)
    except TaskError as error:  # a video
        if len(pairs) > 1:
            return [trace for pair in pairs for trace in sifted(judge, [pair], k, seed)]
        warnings.warn(f"the pair {pairs[0].id} is left out: {error}", stacklevel=2)
        return []


def _sifted(judge: PairwiseJudge, pairs: Sequence[PreferencePair], k: int, seed: int) -> list[tuple[PreferencePair, bool, str]]:
    duels = [AnswerPair(p.id, p.video, p.question, p.chosen, p.rejected[0]) for p in pairs]
    traces = []
    for pair, verdict in zip(pairs, compare(judge, duels, k, "both", seed), strict=True):
        if verdict.consistent and verdict.winner == "a":
            for forward in (True, False):
                traces.append((pair, forward, next(v.said for v in verdict.votes if v.forward is forward and v.a)))
    return traces


def traces_of(rows: Sequence[Any], pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, bool, str]]:
    """Verdicts from rows `id, forward, said`: those of pairs that have a right one in both orders."""
    by_id = {pair.id: pair for pair in pairs}
    right: dict[tuple[str, bool], str] = {}
    for row in rows:
        name, forward, said = str(row["id"]), bool(row["forward"]), str(row["said"])
        if name not in by_id:
            raise TaskError(f"a verdict on the pair {name!r}, which there is not")
        if parse_choice(said)[0] == (1 if forward else 2):
            right.setdefault((name, forward), said)
    return [(by_id[i], forward, right[i, forward]) for i in by_id if {(i, True), (i, False)} <= right.keys() for forward in (True, False)]


def sft_grm(
    grm: VideoGRM, traces: Sequence[tuple[PreferencePair, bool, str]], config: SFTTraining, folder: Path,
    report: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train in place on verdicts. Raises `RewardError` where there is none."""
    if not traces:
        raise RewardError("no verdict is right in both orders: there is nothing to learn from. Give traces of a better judge")
    seen = {id(pair) for pair in _seen(grm, [pair for pair, _, _ in traces])}
    traces = [trace for trace in traces if id(trace[0]) in seen]
    encode, end = TextEncoder(grm.tokenizer), turn_end(grm.chat)
    examples = []
    for pair, forward, said in traces:
        message = pairwise(shown(pair, forward))
        prompt, answer = grm.chat.render([message], tools=()), [*encode(said), end]
        examples.append(Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), message.media))
    return fine_tune(grm.model, examples, grm.tokenizer.pad_token_id or 0, config, folder / "checkpoints", grm.reader, report)


def _seen(grm: VideoGRM, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Those whose videos can be read; warns of the others. Raises `RewardError` where none can."""
    kept, faults = readable(pairs, grm.reader)
    if faults and not kept:
        raise RewardError(f"no pair is left to train on: the videos of all {len(pairs)} cannot be read, such as: {faults[0]}")
    if faults:
        warnings.warn(f"{len(faults)} of {len(pairs)} are left out, as their videos cannot be read, such as: {faults[0]}", stacklevel=3)
    return kept


def verdict_reward(said: str, better: int) -> float:
    """1 for the right verdict, 0.5 for a readable one, nothing for what cannot be read."""
    choice = parse_choice(said)[0]
    return CORRECT * (choice == better) + VALID * (choice is not None)


def grm_trainer(
    grm: VideoGRM, pairs: Sequence[PreferencePair], config: TrainConfig, folder: Path, seed: int = 0, data: str = ""
) -> Trainer:
    """A trainer of the generative reward model on pairs. Each update samples pairs, and shows each in both orders.

    data  a fingerprint of the pairs' files; a run on other data is not resumed
    """
    if config.tasks % 2:
        raise RewardError("tasks must be even: each pair is judged in both orders")
    pairs = _seen(grm, pairs)
    grm.chat.placeholder_ids = grm.reader.ids
    limit = grm.model.config.get_text_config().max_position_embeddings
    budget = Budget(generated=grm.settings.max_tokens, depth=0, turns=1, context=limit)

    def sample_tasks(update: int) -> list[tuple[Task, Budget]]:
        sampled = random.Random(f"grm/{seed}/{update}").choices(pairs, k=config.tasks // 2)
        tasks = []
        for n, pair in enumerate(sampled):
            for forward in (True, False):
                tasks.append(Task(f"{update}/{n}/{pair.id}/{forward}", (pairwise(shown(pair, forward)),), reference=1 if forward else 2))
        return [(task, budget) for task in tasks]

    def reward_function(task: Task, tree: Tree) -> Reward:
        sampled = [i for turn in tree.root.turns for i in turn.sampled]
        said = grm.chat.text([i for i in sampled if i not in grm.chat.stop_ids])
        reward = verdict_reward(said, task.reference)
        return Reward(float(reward > VALID), {}, reward)

    policy = VisionPolicy(grm.model, grm.reader, max_batch=config.max_batch)
    problem = LearningProblem(sample_tasks, reward_function, fingerprint("grm", data))
    return Trainer(Learner(policy, grm.tokenizer, grm.chat, always_show_budget=False), problem, config, folder, seed)
