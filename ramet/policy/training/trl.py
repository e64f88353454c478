"""ramet's environments in TRL: a `rollout_func` for its GRPOTrainer.

    trees = TreeRollouts(tasks, reward_function, chat, clones=4)
    GRPOTrainer(
        model, args=GRPOConfig(num_generations=8 * trees.rows, loss_type="dr_grpo", scale_rewards="none", ...),
        train_dataset=trees.dataset(), reward_funcs=trees.reward, rollout_func=trees,
    ).train()

GRPOTrainer has a fixed number of rows per prompt, so each tree takes `rows` of them: one per branch, and one without a
sampled token for each of the `clones` that it did not start. All of them get the tree's reward, so that the group's mean is the mean
over trees. With `loss_type="dr_grpo"` a tree's weight does not depend on its fan-out, and with `scale_rewards="none"` the gradient is
that of `ramet.policy.training.advantages.rloo` up to a constant factor. Trees are sampled by the transformers backend with the
trainer's own weights. Dropout is turned off in the model, since trees are sampled without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from ramet.agents.budget import Budget
from ramet.agents.chat import ChatFormat
from ramet.agents.growth import seed_of
from ramet.agents.prefixes import FreshCache
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Sampling
from ramet.agents.tree import Branch, Task, Tree
from ramet.errors import ConfigError
from ramet.policy.engines.hf import HFPolicy
from ramet.policy.models.load import without_dropout
from ramet.policy.training.reward import RewardFunction, compute_reward
from ramet.policy.training.update import grow_trees

REWARD = "tree_reward"
"""The column in which a tree's reward is passed to the trainer's reward function."""


class TreeRollouts:
    """Grows the trees of prompts, which are the ids of `tasks`.

    tasks        each with the budget of its trees
    clones       of a tree, at most, whatever its budget allows
    temperature  of sampling; `GRPOConfig.temperature` must be the same
    max_batch    rows that decode together
    grown        the trees of the last call, in order
    """

    def __init__(
        self,
        tasks: Sequence[tuple[Task, Budget]],
        reward_function: RewardFunction,
        chat: ChatFormat,
        clones: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        always_show_budget: bool = True,
        max_batch: int = 64,
    ) -> None:
        self._tasks = {
            task.id: (task, budget.model_copy(update={"clones": clones if budget.clones is None else min(clones, budget.clones)}))
            for task, budget in tasks
        }
        if len(self._tasks) != len(tasks):
            raise ConfigError("two tasks have the same id; TRL gets ids instead of prompts")
        self._reward_function, self._chat, self._temperature, self._seed = reward_function, chat, temperature, seed
        self._always_show_budget, self._max_batch = always_show_budget, max_batch
        self.rows = clones + 1
        self.grown: list[Tree] = []
        self._call = (-1, -1)

    def dataset(self) -> Any:
        """The tasks as a `datasets.Dataset` of prompts."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": list(self._tasks)})

    @staticmethod
    def reward(**columns: Any) -> list[float]:
        """The trainer's `reward_funcs`: the rewards that `__call__` computed."""
        rewards: list[float] = columns[REWARD]
        return rewards

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one tree for every `rows` prompts. Raises `ConfigError` where the trainer's settings do not fit trees."""
        if trainer.args.temperature != self._temperature:
            raise ConfigError(f"GRPOConfig.temperature is {trainer.args.temperature:g} and trees are sampled at {self._temperature:g}")
        slots = [prompts[i : i + self.rows] for i in range(0, len(prompts), self.rows)]
        if any(len(slot) < self.rows or len(set(slot)) > 1 for slot in slots):
            raise ConfigError(f"a tree takes {self.rows} rows: make num_generations and the batch of each process multiples of it")
        step, (last, count) = trainer.state.global_step, self._call
        self._call = (step, count + 1 if step == last else 0)  # by the trainer's own count, which continues when a run is resumed
        place = "/".join(map(str, ("trl", *self._call, trainer.accelerator.process_index)))
        jobs = [Job(*self._tasks[slot[0]], seed_of(self._seed, place, n), (n,)) for n, slot in enumerate(slots)]
        model = trainer.accelerator.unwrap_model(trainer.model)
        without_dropout(model)
        training = model.training
        model.eval()
        try:
            trees = anyio.run(self._grow, model, jobs)
        finally:
            model.train(training)
        self.grown = [trees[n,] for n in range(len(jobs))]
        out: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", REWARD)}
        for job, tree in zip(jobs, self.grown, strict=True):
            reward = compute_reward(self._reward_function, job.task, tree).reward
            rows = [_row(branch) for branch in tree.branches if branch.generated]
            rows += [(list(tree.root.prompt), [trainer.processing_class.pad_token_id], [0.0], [0])] * (self.rows - len(rows))
            for name, values in zip(out, zip(*rows, strict=True), strict=False):
                out[name] += values
            out[REWARD] += [reward] * self.rows
        return out

    async def _grow(self, model: Any, jobs: list[Job]) -> dict[tuple[object, ...], Tree]:
        async with HFPolicy(model, max_batch=self._max_batch) as policy:
            runtime = Runtime(FreshCache(policy), self._chat, Sampling(self._temperature), always_show_budget=self._always_show_budget)
            return await grow_trees(runtime, jobs, 4 * self._max_batch)


def _row(branch: Branch) -> tuple[list[int], list[int], list[float], list[int]]:
    """(prompt ids, completion ids, log-probabilities, mask) of a branch, in TRL's form."""
    start = len(branch.prompt)
    return list(branch.prompt), branch.ids[start:], branch.logprobs[start:], [int(m) for m in branch.mask[start:]]
