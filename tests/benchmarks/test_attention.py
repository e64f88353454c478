"""The attention commands: what they predict is what is done, and they say so when something is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ramet.attention.comm import RankGroup, simulated
from ramet.attention.cost import LayerShape, attention_flops, pairs, received
from ramet.attention.kernels import attend, metered
from ramet.attention.methods import NAMES, Method
from ramet.attention.plan import BlockPlan, apb, spava
from ramet.benchmarks.speed import attention_quality, attention_speed
from ramet.benchmarks.speed.attention import kinds
from ramet.benchmarks.speed.attention_quality import NeedlePlan, bench_needle
from ramet.benchmarks.speed.attention_speed import critical_path, plot, sampling
from ramet.cli.main import app
from ramet.policy.models.catalogue import BASE

SMALL = LayerShape(64, 8, 4, 8, 128)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_operations_and_bytes_are_predicted(name: str, hosts: int) -> None:
    """Against counters in the code that attends and communicates. Causal squares count half, as in APB (arXiv 2502.12085)."""
    if name == "dense" and hosts > 1:
        return
    method = Method(name, **({"anchor": 16, "passing": 4} if name in ("apb", "spava") else {}))  # type: ignore[arg-type]
    plan = method.plan(192, 16, hosts)

    def rank(group: RankGroup) -> tuple[float, int]:
        q, k, v = (torch.randn(h, len(plan.rows(group.rank)), 8) for h in (8, 4, 4))
        with metered() as meter:
            method.attend(plan, group, q, k, v, 0.3)
        return meter.flops, group.traffic.received

    for r, (flops, bytes_) in enumerate(simulated(hosts, rank)):
        expected = attention_flops(method, plan, r, SMALL)
        assert flops == pytest.approx(expected, rel=0.04), "but for the diagonals and the scores"
        assert bytes_ == (received(method, plan, r, SMALL) if hosts > 1 else 0)


def test_the_picture_shows_what_the_mask_allows() -> None:
    plan = spava(60, 4, 2, anchor=4, passing=3)
    picture = kinds(plan, 64)
    assert all(picture[row][key] == 0 for row in range(64) for key in range(row + 1, 64))
    assert sum(kind > 0 for line in picture for kind in line) == 64 * 65 / 2
    block = [1] * 4 + [2] * 14 + [3] * 6
    assert picture[23][:24] == block, "anchor, the first block's selection, its own rows"
    assert set(kinds(apb(60, 4, 2, 4, 3), 64)[10][:11]) == {3}, "the first host of APB has no anchor copy"
    total = sum(pairs(plan, r) for r in range(2))
    assert total < 64 * 65 / 2 + 4 * 5 / 2


def test_sampled_calls_stand_for_all_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_speed, "LONG_CALL", 1e8)
    q, k, v = torch.randn(4, 4096, 16), torch.randn(2, 4096, 16), torch.randn(2, 4096, 16)
    for causal in (False, True):
        with sampling() as clock:
            out, _ = attend(q, k, v, 0.25, causal, "sampled")
        assert clock.whole == (4096 * 4097 / 2 if causal else 4096**2)
        assert 0.05 < clock.timed / clock.whole < 0.5
        assert clock.added > 0
        exact = attend(q, k, v, 0.25, causal).out
        done = out.abs().amax((0, 2)) > 0
        assert 0.05 < done.float().mean() < 0.5
        assert (out[:, done] - exact[:, done]).abs().amax() < 1e-5


def test_the_benchmark_measures_every_method_and_draws(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        records = critical_path(NAMES, [2, 4], [256], 16, 1e10, 1, SMALL)
    finally:
        torch.set_num_threads(threads)
    cases = {(r["method"], r["hosts"], r["phase"], r["scope"]) for r in records}
    assert len(cases) == len(records) == (1 + 2 * 6) * 4
    assert all(r["seconds"] > 0 and r["predicted_seconds"] > 0 for r in records)
    assert all(r["speedup_vs_dense"] == 1 for r in records if r["method"] == "dense")
    plot(records, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_the_commands(tmp_path: Path) -> None:
    run = lambda *arguments: CliRunner().invoke(app, ["attention", *map(str, arguments)])  # noqa: E731
    plan = run("plan", "--context", 400, "--query", 20, "--hosts", 2, "--png", tmp_path / "p.png", "--json", tmp_path / "p.json")
    assert plan.exit_code == 0
    assert (tmp_path / "p.png").exists()
    ranks = [r for r in json.loads((tmp_path / "p.json").read_text()) if r["record"] == "plan"]
    assert sum(r["kept"] for r in ranks) == 420
    assert run("plan", "--method", "ring", "--hosts", 3).exit_code == 0
    check = run("check", "--hosts", 4, "--context", 300, "--anchor", 16, "--passing", 8, "--json", tmp_path / "c.json")
    assert check.exit_code == 0, check.output
    first, *others = [r for r in json.loads((tmp_path / "c.json").read_text()) if r["record"] == "divergence"]
    assert first["difference"] < 2e-4
    assert first["divergence"] < 1e-9
    assert first["ranks_equal"]
    assert {r["method"] for r in others} == {"spava", "apb"}
    assert all(r["divergence"] > 1e-6 for r in others)
    assert "exceed the model's" in str(run("check", "--context", 5000).exception)
    assert isinstance(Method("spava").plan(100, 5, 2), BlockPlan)


def test_the_needle_is_measured_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = attention_quality.needle_text(AutoTokenizer.from_pretrained(BASE), 300, 0.5, 0)
    text = AutoTokenizer.from_pretrained(BASE).decode(given.ids)
    assert text.count(given.code) == 1
    assert 200 < len(given.ids) <= 300
    assert 0.3 < text.index(given.code) / len(text) < 0.7
    run = lambda: bench_needle("nano", NeedlePlan(300, [2], [16], [16], 2, 1, 0), tmp_path)  # noqa: E731
    run()
    assert "apb has no retaining heads here" in capsys.readouterr().out
    written = (tmp_path / "journal.jsonl").read_bytes()
    records = {(r["case"], r["hosts"]): r for r in json.loads((tmp_path / "results.json").read_text()) if r["record"] == "needle"}
    assert set(records) == {("dense", 1), ("spava", 2), ("apb", 2), ("star", 2), ("spava 1/16 1/16", 2)}
    assert records["dense", 1]["divergence"] == 0
    rough = records["spava 1/16 1/16", 2]
    assert rough["divergence"] > 1e-8
    assert 0 < rough["recall"] < 1
    assert rough["pairs"] < 0.5
    assert (tmp_path / "needle.png").exists()
    lines = written.splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:-2]))
    run()
    assert (tmp_path / "journal.jsonl").read_bytes() == written
