"""Judges that do not look at the video, to test a benchmark with: a sound one tells each of them from a real judge and from chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ramet.errors import ConfigError
from ramet.rewards.video.judge import PairwisePrompt


def valid_output(choice: int) -> str:
    """A valid output of a judge that chooses position 1 or 2."""
    return f"<think>a fake</think><answer>{choice}</answer>"


@dataclass(frozen=True)
class FakeJudge:
    """A judge whose outputs are what `rule` gives for a prompt and a random generator, which the seed and the prompt determine."""

    name: str
    rule: Callable[[PairwisePrompt, random.Random], str]

    def judge(self, prompts: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        """See `PairwiseJudge`."""
        outputs = []
        for prompt in prompts:
            rng = random.Random(f"{self.name}/{seed}/{prompt.id}/{prompt.first}/{prompt.second}")
            outputs.append([self.rule(prompt, rng) for _ in range(k)])
        return outputs


def _raise(prompt: PairwisePrompt, rng: random.Random) -> str:
    raise ValueError("a judge that raises")


def fake_judge(name: str, better: Mapping[str, str]) -> FakeJudge:
    """One of the judges always-first, always-second, random, malformed, empty, raising and oracle. Raises `ConfigError` for other names.

    The oracle takes the better answer of each pair from `better`, by the pair's id.
    """
    rules: dict[str, Callable[[PairwisePrompt, random.Random], str]] = {
        "always-first": lambda prompt, rng: valid_output(1),
        "always-second": lambda prompt, rng: valid_output(2),
        "random": lambda prompt, rng: valid_output(rng.randint(1, 2)),
        "malformed": lambda prompt, rng: "<think>both are good</think> The first. <answer>1</answer> or <answer>2</answer>",
        "empty": lambda prompt, rng: "",
        "raising": _raise,
        "oracle": lambda prompt, rng: valid_output(1 if prompt.first == better[prompt.id] else 2),
    }
    if name not in rules:
        raise ConfigError(f"unknown fake judge {name!r}; choose one of {', '.join(rules)}")
    return FakeJudge(name, rules[name])
