"""Training a VideoGRM: supervised fine-tuning on verdicts that are right in both orders, then reinforcement learning on its own outputs.

The stages are those of UnifiedReward-Think (Wang et al. 2025, arXiv 2505.03318), and our own choice: how the published VideoGRM was
trained is not public. The second stage uses the trainer of the delegation policy, with the same rows and loss: a task is a pair in one
order, and a group consists of its samples. A valid output earns 0.5, and a right verdict 1 more. An error stops the run; it is never
counted as a reward. Groups whose samples all earn the same carry no gradient. Pairs whose video cannot be read are left out, with a
warning that gives their number.
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
from ramet.policy.training.reward import Reward
from ramet.policy.training.sft import Example, SFTTraining, fine_tune
from ramet.policy.training.trainer import Learner, Trainer
from ramet.policy.training.update import LearningProblem, TrainConfig
from ramet.rewards.video.generative import VideoGRM, pairwise_message
from ramet.rewards.video.judge import AnswerPair, PairwiseJudge, PairwisePrompt, compare, parse_choice
from ramet.rewards.video.pairs import PreferencePair, readable

CORRECT, VALID = 1.0, 0.5
"""What a right verdict and a valid output earn."""


def pairwise_prompt(pair: PreferencePair, forward: bool) -> PairwisePrompt:
    """The chosen answer and the first rejected one, in one order. forward: the chosen answer is first."""
    a, b = pair.chosen, pair.rejected[0]
    return PairwisePrompt(pair.id, pair.video, pair.question, *((a, b) if forward else (b, a)))


def sifted(judge: PairwiseJudge, pairs: Sequence[PreferencePair], k: int, seed: int) -> list[tuple[PreferencePair, bool, str]]:
    """Traces to learn from, as (pair, order, output): for each pair that the judge gets right in both orders, a right output in each.

    k  votes per order. Raises what the judge raises, except that a pair whose video cannot be read is left out with a warning.
    """
    try:
        return _sifted(judge, pairs, k, seed)
    except TaskError as error:  # a video that cannot be read
        if len(pairs) > 1:
            return [trace for pair in pairs for trace in sifted(judge, [pair], k, seed)]
        warnings.warn(f"the pair {pairs[0].id} is left out: {error}", stacklevel=2)
        return []


def _sifted(judge: PairwiseJudge, pairs: Sequence[PreferencePair], k: int, seed: int) -> list[tuple[PreferencePair, bool, str]]:
    answer_pairs = [AnswerPair(p.id, p.video, p.question, p.chosen, p.rejected[0]) for p in pairs]
    traces = []
    for pair, verdict in zip(pairs, compare(judge, answer_pairs, k, "both", seed), strict=True):
        if verdict.consistent and verdict.winner == "a":
            for forward in (True, False):
                traces.append((pair, forward, next(v.output for v in verdict.votes if v.forward is forward and v.prefers_a)))
    return traces


def traces_of(rows: Sequence[Any], pairs: Sequence[PreferencePair]) -> list[tuple[PreferencePair, bool, str]]:
    """Traces to learn from (see `sifted`), out of rows with a pair's `id`, the order `forward` and an `output`.

    The first right output in each order counts, and a pair without one in both is left out. Raises `TaskError` for a row that lacks a
    column or names a pair that does not exist.
    """
    by_id = {pair.id: pair for pair in pairs}
    right: dict[tuple[str, bool], str] = {}
    for number, row in enumerate(rows, 1):
        if "said" in row and "output" not in row:
            raise TaskError(f"the traces, row {number}: the column said is now called output")
        if missing := [column for column in ("id", "forward", "output") if column not in row]:
            raise TaskError(f"the traces, row {number}, have no column {missing[0]}; a row has id, forward and output")
        name, forward, output = str(row["id"]), bool(row["forward"]), str(row["output"])
        if name not in by_id:
            raise TaskError(f"the traces, row {number}, refer to the pair {name!r}, which does not exist")
        if parse_choice(output)[0] == (1 if forward else 2):
            right.setdefault((name, forward), output)
    return [(by_id[i], forward, right[i, forward]) for i in by_id if {(i, True), (i, False)} <= right.keys() for forward in (True, False)]


def sft_grm(
    grm: VideoGRM, traces: Sequence[tuple[PreferencePair, bool, str]], config: SFTTraining, folder: Path,
    report: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Fine-tune the model in place on traces (see `sifted`). Returns the training log.

    folder  the run folder; checkpoints are written below it
    report  called with each record of the log

    Raises `RewardError` if there is no trace, or none whose video can be read.
    """
    if not traces:
        raise RewardError("no verdict is right in both orders, so there is nothing to learn from; give traces of a better judge")
    readable_pairs = {id(pair) for pair in _with_readable_videos(grm, [pair for pair, _, _ in traces])}
    traces = [trace for trace in traces if id(trace[0]) in readable_pairs]
    encode, end = TextEncoder(grm.tokenizer), turn_end(grm.chat)
    examples = []
    for pair, forward, output in traces:
        message = pairwise_message(pairwise_prompt(pair, forward))
        prompt, answer = grm.chat.render([message], tools=()), [*encode(output), end]
        examples.append(Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), message.media))
    return fine_tune(grm.model, examples, grm.tokenizer.pad_token_id or 0, config, folder / "checkpoints", grm.reader, report)


def _with_readable_videos(grm: VideoGRM, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs whose videos can be read, with a warning about the others. Raises `RewardError` if there are none."""
    kept, faults = readable(pairs, grm.reader)
    if faults and not kept:
        raise RewardError(f"no pair is left to train on: the videos of all {len(pairs)} cannot be read; the first error: {faults[0]}")
    if faults:
        warnings.warn(
            f"{len(faults)} of {len(pairs)} are left out: their videos cannot be read; the first error: {faults[0]}", stacklevel=3
        )
    return kept


def verdict_reward(output: str, better: int) -> float:
    """The reward of an output where `better`, 1 or 2, is the right verdict: 1.5, or 0.5 for the wrong one, or 0 for an invalid output."""
    choice = parse_choice(output)[0]
    return CORRECT * (choice == better) + VALID * (choice is not None)


def grm_trainer(
    grm: VideoGRM, pairs: Sequence[PreferencePair], config: TrainConfig, folder: Path, seed: int = 0, data: str = ""
) -> Trainer:
    """A trainer of the generative reward model on pairs. Each update samples pairs, and shows each in both orders.

    data  a fingerprint of the pairs' files; a run on other data is not resumed

    Raises `RewardError` for an odd number of tasks per update, and if no video can be read.
    """
    if config.tasks % 2:
        raise RewardError("the number of tasks must be even: each pair is judged in both orders")
    pairs = _with_readable_videos(grm, pairs)
    grm.chat.placeholder_ids = grm.reader.ids
    limit = grm.model.config.get_text_config().max_position_embeddings
    budget = Budget(generated=grm.settings.max_tokens, depth=0, turns=1, context=limit)

    def sample_tasks(update: int) -> list[tuple[Task, Budget]]:
        sampled = random.Random(f"grm/{seed}/{update}").choices(pairs, k=config.tasks // 2)
        tasks = []
        for n, pair in enumerate(sampled):
            for forward in (True, False):
                message = pairwise_message(pairwise_prompt(pair, forward))
                tasks.append(Task(f"{update}/{n}/{pair.id}/{forward}", (message,), reference=1 if forward else 2))
        return [(task, budget) for task in tasks]

    def reward_function(task: Task, tree: Tree) -> Reward:
        sampled = [i for turn in tree.root.turns for i in turn.sampled]
        output = grm.chat.text([i for i in sampled if i not in grm.chat.stop_ids])
        reward = verdict_reward(output, task.reference)
        return Reward(float(reward > VALID), {}, reward)

    policy = VisionPolicy(grm.model, grm.reader, max_batch=config.max_batch)
    problem = LearningProblem(sample_tasks, reward_function, fingerprint("grm", data))
    return Trainer(Learner(policy, grm.tokenizer, grm.chat, always_show_budget=False), problem, config, folder, seed)
