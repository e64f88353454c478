"""Judges that do not look, to see what a benchmark makes of them: a sound one tells each of them from a judge and from chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ramet.errors import ConfigError
from ramet.rewards.video.judge import PairwisePrompt


def says(choice: int) -> str:
    """A valid output."""
    return f"<think>a fake</think><answer>{choice}</answer>"


@dataclass(frozen=True)
class FakeJudge:
    """Says what `rule` gives for a question and a number of the seed's stream."""

    name: str
    rule: Callable[[PairwisePrompt, random.Random], str]

    def judge(self, shown: Sequence[PairwisePrompt], k: int, seed: int) -> list[list[str]]:
        outputs = []
        for one in shown:
            rng = random.Random(f"{self.name}/{seed}/{one.id}/{one.first}/{one.second}")
            outputs.append([self.rule(one, rng) for _ in range(k)])
        return outputs


def _raise(shown: PairwisePrompt, rng: random.Random) -> str:
    raise ValueError("a judge that raises")


def fake_judge(name: str, better: Mapping[str, str]) -> FakeJudge:
    """always-first, always-second, random, malformed, empty, raising, or oracle: one that knows the better answer of each id."""
    rules: dict[str, Callable[[PairwisePrompt, random.Random], str]] = {
        "always-first": lambda shown, rng: says(1),
        "always-second": lambda shown, rng: says(2),
        "random": lambda shown, rng: says(rng.randint(1, 2)),
        "malformed": lambda shown, rng: "<think>both are good</think> The first. <answer>1</answer> or <answer>2</answer>",
        "empty": lambda shown, rng: "",
        "raising": _raise,
        "oracle": lambda shown, rng: says(1 if shown.first == better[shown.id] else 2),
    }
    if name not in rules:
        raise ConfigError(f"no fake judge {name!r}; there are {', '.join(rules)}")
    return FakeJudge(name, rules[name])
