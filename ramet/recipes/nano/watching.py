"""Demonstrations of questions about segments: half of them guess unseen, the others have clones watch all segments or the right one.

A program grows whole trees through the real runtime, so that what is learned is laid out as it will be sampled. From these a small model
learns all three ways and to prefer none; which of them pays is for reinforcement learning to find out.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from ramet.agents import drain
from ramet.agents.budget import Budget
from ramet.agents.chat import ControlTokenFormat
from ramet.agents.protocol import render_call
from ramet.agents.runtime import Job, Runtime
from ramet.agents.sampling import Partial, Sample, SampleRequest
from ramet.agents.tree import StopReason, Task, Tree
from ramet.policy.training.sft import Example
from ramet.rewards.video.questions import VideoQuestion

WATCH = "What colour is the square?"
"""The objective of clones."""


@dataclass
class Teacher:
    """A policy that demonstrates: the root calls clones or guesses, as `plans` says, and clones answer what their segment shows."""

    chat: ControlTokenFormat
    truth: Mapping[tuple[str, float], str]
    """The colour of each scene, by file and start."""
    plans: dict[str, tuple[Task, list[str], random.Random]] = field(default_factory=dict)
    """For each task the segments that clones are to watch; none: it is guessed."""
    version = 0
    context = None

    async def sample(self, request: SampleRequest, partial: Partial) -> Sample:
        """The turn that the demonstration has next; see `Policy`."""
        await anyio.lowlevel.checkpoint()
        ids = tuple(self._turn(request))
        return Sample(ids, (0.0,) * len(ids), StopReason.END, len(request.prompt))

    def _turn(self, request: SampleRequest) -> list[int]:
        if request.media:
            segment = request.media[0]
            return self.chat.turn(f"Answer: {self.truth[segment.file, segment.start]}")
        task, keys, rng = self.plans[request.group.rpartition("/")[0]]
        question: VideoQuestion = task.reference
        if not keys:
            return self.chat.turn(f"Answer: {rng.choice(question.choices)}")
        if "<tool_call>" in self.chat.text(request.prompt):
            return self.chat.turn(f"Answer: {question.answer}")
        return self.chat.turn("", render_call([{"objective": WATCH, "context_keys": [key]} for key in keys]))


def needed(task: Task) -> list[str]:
    """The segments that a question names."""
    question: VideoQuestion = task.reference
    return [key for key in task.documents if f" {key}?" in question.question]


def demonstrate_watching(tasks: Sequence[Task], truth: Mapping[tuple[str, float], str], chat: ControlTokenFormat, seed: int) -> list[Tree]:
    """A tree for each task."""
    teacher = Teacher(chat, truth)

    async def main() -> list[Tree]:
        runtime = Runtime(teacher, chat, always_show_budget=False)
        jobs = []
        for n, task in enumerate(tasks):
            rng = random.Random(f"watching/{seed}/{n}")
            teacher.plans[task.id] = (task, [[], needed(task), [], list(task.documents)][n % 4], rng)
            jobs.append(Job(task, Budget(generated=rng.randint(150, 400), answer_reserve=8, depth=1, width=16, turns=8), seed, (n,)))
        grown: dict[Any, Tree] = {}
        async with runtime.run_many(jobs) as trees:
            async for job, tree in trees:
                grown[job.key] = tree
        return [grown[n,] for n in range(len(tasks))]

    return drain.run(main)


def examples(trees: Sequence[Tree]) -> list[Example]:
    """A training example for every branch of the trees, of which the sampled tokens are learned."""
    return [Example(b.ids, b.mask, b.media) for tree in trees for b in tree.branches]


def scenes_of(question: VideoQuestion, colours: Sequence[str], seconds: float) -> dict[tuple[str, float], str]:
    """The colour of each scene of a video, by file and start, where all scenes last equally long."""
    return {(question.video.file, question.video.start + n * seconds): colour for n, colour in enumerate(colours)}
