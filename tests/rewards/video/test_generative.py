"""VideoGRM: an output counts only in the exact format, a pure slot-picker is seen as one, and reinforcement learning moves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ramet.agents.journal import Journal
from ramet.agents.tree import Branch, Status, StopReason, Tree, Turn, price
from ramet.benchmarks.evaluation.video_reward import BenchmarkProtocol, results, run_bench
from ramet.errors import CheckpointError, RewardError, TaskError
from ramet.policy.engines.vision import VideoSettings
from ramet.policy.training.reward import Reward
from ramet.policy.training.sft import SFTTraining
from ramet.policy.training.trainer import run_trainer
from ramet.policy.training.update import TrainConfig
from ramet.rewards.video import generative
from ramet.rewards.video.answerers import ModelAnswerer
from ramet.rewards.video.discriminative import VideoAnswer
from ramet.rewards.video.fakes import fake_judge, valid_output
from ramet.rewards.video.generative import GRM_SETTINGS, GRMSettings, VideoGRM, saved_settings
from ramet.rewards.video.judge import AnswerPair, compare, parse_choice
from ramet.rewards.video.pairs import PreferencePair
from ramet.rewards.video.train_grm import grm_trainer, pairwise_prompt, sft_grm, sifted, traces_of, verdict_reward

SETTINGS = GRMSettings(VideoSettings(max_frames=2, max_pixels=56 * 56), max_tokens=40)


@pytest.fixture
def grm(base: Path) -> VideoGRM:
    return VideoGRM.load(base, SETTINGS)


def pairs_of(questions: list) -> list[PreferencePair]:
    return [
        PreferencePair(q.id, q.video, q.question, q.answer, (next(c for c in q.choices if c != q.answer),), q.category) for q in questions
    ]


def test_what_earns_what() -> None:
    earned = {
        said: verdict_reward(said, 1)
        for said in (valid_output(1), valid_output(2), "", "1", valid_output(1) + valid_output(2), valid_output(1) + "!")
    }
    assert list(earned.values()) == [1.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_verdicts_to_learn_from_are_right_in_both_orders(questions: list) -> None:
    pairs = pairs_of(questions)[:12]
    chosen = sifted(fake_judge("oracle", {p.id: p.chosen for p in pairs}), pairs, 2, 0)
    assert [(p.id, f) for p, f, _ in chosen] == [(p.id, f) for p in pairs for f in (True, False)]
    assert all(parse_choice(said)[0] == (1 if forward else 2) for _, forward, said in chosen)
    assert sifted(fake_judge("always-first", {}), pairs, 3, 0) == []
    assert sifted(fake_judge("malformed", {}), pairs, 1, 0) == []
    rows = [{"id": p.id, "forward": f, "output": valid_output(1)} for p in pairs for f in (True, False)]
    assert traces_of(rows, pairs) == []  # right forwards only
    rows.append({"id": pairs[3].id, "forward": False, "output": valid_output(2)})
    assert [p.id for p, _, _ in traces_of(rows, pairs)] == [pairs[3].id] * 2
    with pytest.raises(TaskError, match="row 1, refer to the pair 'none', which does not exist"):
        traces_of([{"id": "none", "forward": True, "output": valid_output(1)}], pairs)


def test_pairs_whose_videos_cannot_be_read_are_left_out_with_a_count(grm: VideoGRM, questions: list, tmp_path: Path) -> None:
    """Where verdicts are gathered, where they are learned, and where they are reinforced."""
    pairs = pairs_of(questions)[:3]
    pairs.insert(1, replace(pairs[0], id="broken", video=replace(pairs[0].video, file=str(tmp_path / "none.mp4"))))

    class Watches:
        name = "watches"

        def judge(self, shown: Any, k: int, seed: int) -> list[list[str]]:
            for one in shown:
                grm.reader(one.video)
            return [[valid_output(1 if one.first in {p.chosen for p in pairs if p.id == one.id} else 2)] * k for one in shown]

    with pytest.warns(UserWarning, match="the pair broken is left out: "):
        assert [p.id for p, forward, _ in sifted(Watches(), pairs, 1, 0) if forward] == [pairs[0].id, pairs[2].id, pairs[3].id]
    traces = [(p, f, valid_output(1 if f else 2)) for p in pairs for f in (True, False)]
    with pytest.warns(UserWarning, match=r"2 of 8 are left out: their videos cannot be read; the first error: .*none.mp4"):
        sft_grm(grm, traces, SFTTraining(steps=1, batch=2, at_once=2, lora_rank=0), tmp_path / "sft")
    with pytest.warns(UserWarning, match="1 of 4 are left out"):
        trainer = grm_trainer(grm, pairs, TrainConfig(tasks=8), tmp_path / "rl")
    assert all("broken" not in task.id for update in range(8) for task, _ in trainer.sample_tasks(update))
    with pytest.raises(RewardError, match=r"the videos of all 1 cannot be read; the first error: .*none.mp4"):
        grm_trainer(grm, pairs[1:2], TrainConfig(tasks=2), tmp_path)


def test_a_model_that_learned_one_place_is_seen_as_one(grm: VideoGRM, questions: list, tmp_path: Path) -> None:
    """Format and slot by heart: no output is unreadable, and position-consistent accuracy is 0, not one half."""
    pairs = pairs_of(questions)[:24]
    traces = [(p, f, "<think>Look.</think><answer>2</answer>") for p in pairs for f in (True, False)]
    log = sft_grm(grm, traces, SFTTraining(steps=90, batch=8, at_once=8, learning_rate=3e-3, lora_rank=0), tmp_path)
    assert log[-1]["loss"] < 0.05
    judge = VideoGRM(grm.model, grm.tokenizer, grm.chat, replace(SETTINGS, temperature=0.0))
    with Journal(tmp_path / "j.jsonl", "job") as journal:
        found = results(run_bench(judge, pairs, BenchmarkProtocol("pairwise", k=2), ["right"], journal))[0]
    expected = {"invalid_rate": 0.0, "forward": 0.0, "reversed": 1.0, "consistent": 0.0, "letter_agreement": 1.0, "first_share": 0.0}
    assert {n: found[n] for n in expected} == expected
    with pytest.raises(RewardError, match="nothing to learn from"):
        sft_grm(grm, [], SFTTraining(), tmp_path)


def test_reinforcement_moves_verdicts_by_the_trainer_of_the_delegation_policy(grm: VideoGRM, questions: list, tmp_path: Path) -> None:
    """A bandit: format is known, the place is even; paying for place 1 makes it say 1."""
    pairs = pairs_of(questions)[:24]
    traces = [(p, f, f"<think>Look.</think><answer>{1 + (n + f) % 2}</answer>") for n, p in enumerate(pairs) for f in (True, False)]
    sft_grm(grm, traces, SFTTraining(steps=160, batch=8, at_once=8, learning_rate=3e-3, lora_rank=0), tmp_path / "sft")
    config = TrainConfig(
        updates=12, tasks=4, group_size=8, minibatches=1, learning_rate=1e-3, warmup=0, max_grad_norm=0.5, checkpoint_every=6
    )
    trainer = grm_trainer(grm, pairs, config, tmp_path / "rl")

    def judge(task: Any, tree: Any) -> Any:
        sampled = [i for turn in tree.root.turns for i in turn.sampled if i not in grm.chat.stop_ids]
        return Reward(0.0, {}, verdict_reward(grm.chat.text(sampled), 1))

    drawn = trainer.sample_tasks(0)
    assert [task.reference for task, _ in drawn] == [1, 2, 1, 2]  # both orders of each pair
    right = next(p for p in pairs if p.id in drawn[0][0].id)
    assert pairwise_prompt(right, True).first in drawn[0][0].messages[0].content.split("Answer 1: ")[1]
    assert trainer.reward_function.__name__ == "reward_function"
    trainer.reward_function = judge
    told: list[dict[str, float]] = []
    run_trainer(trainer, told.append)
    first, last = (sum(m["reward"] for m in part) / 3 for part in (told[:3], told[-3:]))
    assert first < 1.3
    assert last > first + 0.15
    assert (tmp_path / "rl" / "checkpoints" / "step-000012" / "model.safetensors").exists()
    with pytest.raises(RewardError, match="number of tasks must be even"):
        grm_trainer(grm, pairs, TrainConfig(tasks=3), tmp_path)


def test_a_votes_words_do_not_depend_on_its_company(grm: VideoGRM, questions: list) -> None:
    """k votes of one call are those of calls one by one, and of other batches."""
    pairs = pairs_of(questions)[:3]
    asked = [pairwise_prompt(p, f) for p in pairs for f in (True, False)]
    together = grm.judge(asked, 3, seed=5)
    assert [grm.judge([one], 3, seed=5)[0] for one in asked] == together
    assert len({said for group in together for said in group}) > 10


def test_ratings_are_read_or_refused(grm: VideoGRM, questions: list, tmp_path: Path) -> None:
    items = [VideoAnswer(q.video, q.question, f"Answer: {q.answer}") for q in questions[:3]]
    with pytest.raises(RewardError, match="can be read"):
        grm.score(items)
    assert [rating for rating, _ in grm.rate(items)] == [None] * 3

    class Fixed(VideoGRM):
        def _text(self, sample: Any) -> str:
            return "<think>well</think><answer>7</answer>"

    fixed = Fixed(grm.model, grm.tokenizer, grm.chat, replace(SETTINGS, votes=2))
    assert fixed.score(items) == [7.0] * 3
    expected = Fixed(grm.model, grm.tokenizer, grm.chat, replace(SETTINGS, expected=True)).score(items)
    assert all(1 < rating < 10 for rating in expected)
    with pytest.MonkeyPatch.context() as patch:  # more than are remembered
        patch.setattr(generative, "SCORES", 2)
        assert fixed.score([*items, VideoAnswer(None, "q", "a")]) == [7.0] * 4
    assert len(fixed._known) == 2


def test_a_prompt_that_leaves_no_room_is_refused(grm: VideoGRM) -> None:
    with pytest.raises(RewardError, match="leave no room for a verdict in the model's 2048"):
        compare(grm, [AnswerPair("d", None, "why " * 3000, "a", "b")])


def test_a_model_answers_questions(grm: VideoGRM, questions: list) -> None:
    answers = ModelAnswerer(grm, "small").answer(questions[:2], 2, 0)
    assert [len(a) for a in answers] == [2, 2]
    assert answers != ModelAnswerer(grm, "small").answer(questions[:2], 2, 0, blind=True)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_training_that_was_cut_off_ends_with_the_weights_of_one_that_was_not(
    base: Path, questions: list, tmp_path: Path, rank: int
) -> None:
    """With all weights and with adapters: checkpoints of vision-language models store their weights under other names."""
    pairs = pairs_of(questions)[:8]
    traces = [(p, f, valid_output(1 if f else 2)) for p in pairs for f in (True, False)]
    config = SFTTraining(steps=20, batch=4, at_once=4, learning_rate=1e-2, lora_rank=rank, save_every=5)
    whole, cut, again = (VideoGRM.load(base, SETTINGS) for _ in range(3))
    sft_grm(whole, traces, config, tmp_path / "whole")

    def stop(entry: dict[str, float]) -> None:
        raise KeyboardInterrupt  # at step 10, the last checkpoint behind it

    with pytest.raises(KeyboardInterrupt):
        sft_grm(cut, traces, config, tmp_path / "cut", stop)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-5"]
    sft_grm(again, traces, config, tmp_path / "cut")
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    if not rank:
        start = VideoGRM.load(base, SETTINGS).model.state_dict()
        assert all(torch.equal(start[n], found[n]) == (".visual." in n) for n in start if ".layers." in n or ".visual." in n)


def test_the_reward_of_a_verdict_is_by_the_order_that_was_shown(grm: VideoGRM, questions: list, tmp_path: Path) -> None:
    """The trainer's own judge on trees that say 1, 2 and nothing readable, for a pair in both orders."""
    trainer = grm_trainer(grm, pairs_of(questions), TrainConfig(tasks=2), tmp_path)
    for task, _ in trainer.sample_tasks(3):
        earned = {}
        for said in (valid_output(1), valid_output(2), "I cannot say."):
            ids = (*grm._encode(said), min(grm.chat.stop_ids))
            turn = Turn(ids, (0.0,) * len(ids), StopReason.END)
            branch = Branch("0", (1,), (turn,), Status.ANSWERED, None)
            earned[said] = trainer.reward_function(task, Tree(task.id, branch, price(branch))).reward
        assert earned == {valid_output(task.reference): 1.5, valid_output(3 - task.reference): 0.5, "I cannot say.": 0.0}
        shown_first = task.messages[0].content.split("Answer 1: ")[1].split("\n")[0]
        better = next(p.chosen for p in pairs_of(questions) if f"/{p.id}/" in task.id)
        assert (shown_first == better) == (task.reference == 1)


def test_a_directory_keeps_how_its_model_watches_and_samples(grm: VideoGRM, tmp_path: Path) -> None:
    grm.save(tmp_path)
    assert saved_settings(tmp_path) == SETTINGS == VideoGRM.load(tmp_path).settings
    (tmp_path / GRM_SETTINGS).write_text('{"video": 3}')
    with pytest.raises(CheckpointError, match=r"video_grm\.json does not hold the settings of a VideoGRM"):
        VideoGRM.load(tmp_path)
