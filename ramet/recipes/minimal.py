"""The whole of learning to delegate in one file, to be read from top to bottom: sample trees, score them, give credit, take a step.

    python -m ramet.recipes.minimal --updates 20

The nano model adds up sums in rows. It may add them itself, token after token, or hand rows to clones of itself, which work side by
side. Nobody tells it which: a tree of clones earns one reward, and every token that any of its branches sampled is made more
or less likely by that reward.

Seen with `--updates 29 --seed 0` (one run, 135 s of processor time on one core, other jobs beside it): the share of trees that spawn
went from 0.55 to 0.95, the mean reward from 0.747 over the first ten updates to 0.857 over the last ten. An update's own figure says
little, since its tasks are new: those of ten neighbouring updates have a standard deviation of 0.04 to 0.07. So few updates teach that
long sums want clones, and not yet that short ones are a little cheaper without.

What `ramet train` has besides, and this leaves out: settings files, checkpoints and resuming, journals, a KL term, several
steps from one batch of trees, warm-up and decay of the learning rate, weights in bfloat16, adapters, metrics.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import anyio
import torch

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.growth import seed_of
from ramet.agents.runtime import Runtime
from ramet.agents.sampling import Policy, Sampling
from ramet.agents.tree import Task, Tree
from ramet.env.arithmetic import RowsEnvironment
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.catalogue import BASE
from ramet.policy.models.load import load_model
from ramet.policy.training.advantages import ScoredTree, rloo
from ramet.policy.training.loss import policy_loss
from ramet.policy.training.reward import Reward
from ramet.policy.training.rows import batches, rows_of, token_logprobs
from ramet.policy.training.update import Group, Targets, group_trees, grow_trees, tree_jobs
from ramet.rewards.penalty import Prices

ENVIRONMENT = RowsEnvironment(operands=(6, 24))
# Up to about a dozen operands a sum is a little cheaper alone; of longer ones the model alone gets few right. The limit leaves room for
# clones on every sum, so what decides is what pays.
BUDGET = Budget(generated=256, depth=1, width=16, turns=8, context=768, answer_reserve=8)
# Tokens cost, and those that have to be waited for cost more: without a price there would be nothing to learn on sums that come out
# right either way. A wrong answer earns 0 whatever it cost, or failing cheaply would be learned where nothing succeeds.
PRICES = Prices(generated=0.0003, critical_path=0.0006, failure=0.0)
TASKS, TREES = 16, 8
# Sharper than the model's own distribution: the nano model's digits are then mostly right, and trees differ by what they decide.
TEMPERATURE = 0.5
LEARNING_RATE = 4e-4
# Divides the loss of a tree. A constant: divided by the tree's own length instead, a wrong answer would hurt less for being long.
LENGTH = 64
CLIP = 0.2
# Padded tokens of one forward pass: memory, and nothing else.
BATCH_TOKENS = 4096


def tasks_of(update: int, seed: int) -> list[tuple[Task, Budget]]:
    """The update's tasks, each with the budget of its trees: new ones every time, a function of the seed and the update's number."""
    return [(task, BUDGET) for task in ENVIRONMENT.tasks("train", TASKS, seed_of(seed, "tasks", update))]


def reward_of(task: Task, tree: Tree) -> Reward:
    """The score of the root's answer less what the whole tree cost. Clones get no reward of their own: they are as good as the tree."""
    score = ENVIRONMENT.grade(task, tree.answer)
    penalties = PRICES.penalties(tree)
    return Reward(score, penalties, PRICES.reward(tree, score, penalties))


async def sample(policy: Policy, chat: ChatFormat, update: int, seed: int) -> list[Group]:
    """Each task's trees. All grow at the same time, so that the engine decodes roots and clones of all of them in one batch.

    Every tree has a seed of its own: a group of equal trees would have nothing to be compared with.
    """
    tasks = tasks_of(update, seed)
    runtime = Runtime(policy, chat, Sampling(temperature=TEMPERATURE))
    return group_trees(tasks, await grow_trees(runtime, tree_jobs(tasks, update, TREES, seed), in_flight=TASKS * TREES), TREES)


def backward(model: Any, groups: list[Group]) -> list[float]:
    """Add the gradient of the update's loss to the model's weights. Returns the reward of every tree."""
    rewards, rows = [], []
    for task, trees in groups:
        scored = [ScoredTree(tree, reward_of(task, tree).reward) for tree in trees]
        # Credit: a tree is as good as its reward is above the mean of the *other* trees of its task. What the task itself is worth cancels
        # out, and since a tree's own actions do not move what it is compared with, the gradient stays unbiased.
        for item, advantages in zip(scored, rloo(scored), strict=True):
            # One row per branch, each token with the log-probability under which it was sampled. Root and clones weigh
            # the same: a weight of 1/branches would pay for spawning, or for not spawning, by itself.
            rows += rows_of(item.tree, advantages, weight=1 / (TASKS * TREES * LENGTH))
        rewards += [item.reward for item in scored]
    # Branches of like length are computed together; the loss is a sum, so how they are batched changes nothing but speed.
    for batch in batches([row.ids for row in rows], BATCH_TOKENS):
        target = Targets.from_rows(batch, rows)
        # The distribution that was sampled from, temperature included; else the gradient would be that of another policy.
        logprobs, entropy, kl = token_logprobs(model, batch.ids, TEMPERATURE)
        # Only sampled tokens count: prompts, and what tools and clones wrote into a context, were nobody's decision there.
        # The weights have not moved since the trees were sampled: the ratio in this loss is 1, its gradient that of log-probability
        # times advantage, and nothing is clipped. With more than one step from the same trees the clipping would matter.
        sums = policy_loss(logprobs, target.behaviour, target.advantages, target.weights, target.mask, entropy, kl)
        sums.loss.backward()
    return rewards


async def train(model: Any, chat: ChatFormat, updates: int, seed: int, report: Callable[[int, float, float], None]) -> None:
    """Train the model in place. `report` gets each update's number, the mean reward of its trees and the share of them that spawned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    async with HFPolicy(model, max_batch=TASKS * TREES) as policy:
        for update in range(updates):
            groups = await sample(policy, chat, update, seed)
            rewards = backward(model, groups)
            # A few trees with rare luck can make a gradient many times the usual one; one such step would undo many.
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            # The engine keeps what it computed of prompts for reuse; under the new weights that is no longer true.
            policy.refresh(update + 1)
            spawned = [tree.spawned for _, trees in groups for tree in trees]
            report(update, sum(rewards) / len(rewards), sum(spawned) / len(spawned))


def show(update: int, reward: float, spawned: float) -> None:
    """Print an update's line."""
    print(f"{update:6}  {reward:6.3f}  {spawned:7.2f}", flush=True)


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(prog="python -m ramet.recipes.minimal", description="The whole learning loop on the nano model.")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.updates < 1:
        parser.error(f"--updates is how often the model is changed, at least 1, not {arguments.updates}")
    # Sums in another order round differently: with one thread, a seed prints the same figures on every run.
    torch.set_num_threads(1)
    model, _, chat = load_model(BASE)
    print("update  reward  spawned")
    anyio.run(train, model, chat, arguments.updates, arguments.seed, show)


if __name__ == "__main__":
    main()
