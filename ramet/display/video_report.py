"""Plots, tables and the page of a video reward model's evaluation."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD

from ramet.agents.tree import Segment
from ramet.display.plots import picture, save, subplots
from ramet.display.report import STYLE, table
from ramet.errors import TaskError
from ramet.media.frames import read_frames
from ramet.rewards.video.pairs import PreferencePair, segments_of
from ramet.storage import Record, write_text
from ramet.terminal import Table, show

TITLES = {
    "right": "its own video",
    "wrong": "another video",
    "none": "no video",
    "reversed": "frames reversed",
    "shuffled": "frames shuffled",
}


@picture
def accuracy_bars(records: Sequence[Record], path: Path) -> None:
    """Accuracy on each subset under each condition, with 95% error bars and a line at chance."""
    results = [r for r in records if r["record"] == "result" and r["subset"] != "macro"]
    subsets, conditions = list(dict.fromkeys(r["subset"] for r in results)), list(dict.fromkeys(r["condition"] for r in results))
    figure, (row,) = subplots(1, 1)
    width = 0.8 / len(conditions)
    for n, condition in enumerate(conditions):
        by_subset = {r["subset"]: r for r in results if r["condition"] == condition}
        places = [s for s, subset in enumerate(subsets) if subset in by_subset]
        own = [by_subset[subsets[s]] for s in places]
        heights = [r["accuracy"] for r in own]
        bars = [[max(r["accuracy"] - r["ci_low"], 0) for r in own], [max(r["ci_high"] - r["accuracy"], 0) for r in own]]
        row[0].bar([s + (n - (len(conditions) - 1) / 2) * width for s in places], heights, width * 0.92, yerr=bars, label=TITLES[condition],
                   error_kw={"elinewidth": 0.8}, color=f"C{list(TITLES).index(condition)}")  # fmt: skip
    row[0].axhline(0.5, color="#888", lw=1, ls="--")
    row[0].set_xticks(range(len(subsets)), subsets)
    row[0].set(ylabel="prefers the better answer", ylim=(0, 1.05))
    row[0].legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    save(figure, path)


@picture
def best_of_n_curves(records: Sequence[Record], path: Path) -> None:
    """The accuracy of each method by N, with 95% bands."""
    curves = [r for r in records if r["record"] == "best_of_n"]
    figure, (row,) = subplots(1, 1)
    for n, method in enumerate(dict.fromkeys(r["method"] for r in curves)):
        line = sorted((r for r in curves if r["method"] == method), key=lambda r: r["n"])
        style = {"color": "#444", "ls": "--"} if method == "pass" else {"color": "#aaa"} if method == "random" else {"color": f"C{n}"}
        xs = [r["n"] for r in line]
        row[0].plot(
            xs, [r["accuracy"] for r in line], marker="o", ms=3.5, label="pass@N: the bound" if method == "pass" else method, **style
        )
        row[0].fill_between(xs, [r["ci_low"] for r in line], [r["ci_high"] for r in line], alpha=0.12, lw=0, color=style["color"])
    row[0].set_xscale("log", base=2)
    row[0].set_xticks(xs, xs)
    row[0].set(xlabel="N, answers to pick from", ylabel="accuracy", ylim=(0, 1.05))
    row[0].legend(frameon=False, fontsize=8.5)
    save(figure, path)


@picture
def training_curve(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss and accuracy on the training pairs by step."""
    figure, (row,) = subplots(1, 2)
    for axis, name in zip(row, ("loss", "accuracy"), strict=True):
        axis.plot([entry["step"] for entry in log], [entry[name] for entry in log], color="#c0392b")
        axis.set(xlabel="step", title=f"{name} on training pairs")
    save(figure, path)


MEASURES = {
    "consistent": "both", "letter_agreement": "place", "first_share": "1st", "invalid_rate": "unread", "tie_rate": "ties",
    "forward": "forward", "reversed": "reversed", "lenient": "lenient",
}  # fmt: skip
"""Measures shown beside accuracy with their column headers, the most informative first.

They are the shares of pairs that are right in both orders and that choose the same place in both orders, of votes for the first answer,
of unreadable votes and of ties, and the accuracy with the better answer first, with it last, and with ties counted as right.
"""


def results_table(records: Sequence[Record], measures: int = len(MEASURES)) -> tuple[list[str], list[list[str]]]:
    """Headers and rows with up to `measures` measures; the terminal has room for fewer than the page."""
    results = [r for r in records if r["record"] == "result"]
    columns = [n for n in MEASURES if any(n in r for r in results)][:measures]
    swept = [n for n in ("frames", "k") if len({r[n] for r in results if n in r}) > 1]
    rows = []
    for r in results:
        interval = f"{r['ci_low']:.3f}-{r['ci_high']:.3f}" if "ci_low" in r else ""
        rows.append(
            [
                r["condition"],
                r["subset"],
                str(r["n"]),
                f"{r['accuracy']:.3f}",
                interval,
                *(f"{r[n]:.2f}" if n in r else "" for n in columns),
                *(str(r[n]) for n in swept),
            ]
        )
    return ["video", "subset", "n", "right", "95%", *(MEASURES[n] for n in columns), *swept], rows


def wrong_pairs(pairs: Sequence[PreferencePair], records: Sequence[Record], wrong: Sequence[str], limit: int = 12) -> str:
    """HTML of the first `limit` pairs that were judged wrongly with their own video, with frames of it. `wrong` holds their ids."""
    by_id = {pair.id: pair for pair in pairs}
    judged = {r["id"]: r for r in records if r.get("condition") == "right"}
    parts = [f"<h2>Pairs judged wrongly: {len(wrong)} of {len(judged)}</h2>"]
    for name in wrong[:limit]:
        pair = by_id[name]
        parts.append(f"<h3>{escape(name)} ({escape(pair.category or 'no category')})</h3>{_frames(pair)}<p>{escape(pair.question)}</p>")
        parts.append(f"<p><b>better:</b> {escape(pair.chosen)}</p>")
        parts += [f"<p><b>worse:</b> {escape(answer)}</p>" for answer in pair.rejected]
        parts.append(f"<pre>{escape(_judgement(judged[name]))}</pre>")
    return "".join(parts)


def _judgement(record: Record) -> str:
    """The scores of a pair, or the text of its votes."""
    if "chosen" in record:
        return f"score {record['chosen']:.3f} for the better answer, {', '.join(f'{s:.3f}' for s in record['rejected'])} for the worse"
    votes = [vote for votes in record["votes"] for vote in votes]
    return "\n".join(f"{'better' if forward else 'worse'} first: {error or text}" for forward, _, text, error in votes)


def _frames(pair: PreferencePair, count: int = 4) -> str:
    """HTML of `count` frames of each video of a pair."""
    return "".join(_frames_of(segment, count) for segment in segments_of(pair.video))


def _frames_of(segment: Segment, count: int) -> str:
    """HTML of `count` frames of one video, or the error if it cannot be read."""
    from PIL import Image

    try:
        frames = read_frames(Path(segment.file), count, segment.start, segment.end)
    except TaskError as error:
        return f"<p>{escape(str(error))}</p>"
    images = []
    for frame, time in zip(frames.pixels, frames.times, strict=True):
        image = Image.fromarray(frame)
        image.thumbnail((200, 200))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        images.append(f'<img alt="at {time:.1f} s" title="{time:.1f} s" style="width:150px" src="data:image/png;base64,{data}"> ')
    return f"<p>{''.join(images)}</p>"


def write_page(
    path: Path, title: str, intro: str, protocol: str, records: Sequence[Record], pictures: Sequence[Path], more: str = ""
) -> None:
    """Write the page, with its pictures inside; pictures that do not exist are left out. `more` is HTML for the end of the page."""
    parts = [f"<h1>{escape(title)}</h1><p>{escape(intro)}</p>"]
    for picture_file in filter(Path.exists, pictures):
        data = base64.b64encode(picture_file.read_bytes()).decode()
        parts.append(f'<p><img alt="{escape(picture_file.stem)}" src="data:image/png;base64,{data}"></p>')
    parts.append(f"<h2>Results</h2><p>Protocol: {escape(protocol)}</p>{table(*results_table(records))}")
    parts.append('<p class="note">Intervals are 95%, clustered by video; that of macro is from a bootstrap.</p>')
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
    write_text(path, head + "".join(parts) + more + "</body></html>\n")


def print_results(records: list[dict[str, Any]]) -> None:
    """Print results and best-of-N curves as tables."""
    protocol = next((r["line"] for r in records if r["record"] == "protocol"), "")
    headers, rows = results_table(records, 4)
    results = Table(title="how often the better answer is preferred", caption=protocol, box=SIMPLE_HEAD)
    for header in headers:
        results.add_column(header, no_wrap=True, justify="left" if header in ("video", "subset") else "right")
    for row in rows:
        results.add_row(*row)
    if rows:
        show(results)
    curves = [r for r in records if r["record"] == "best_of_n"]
    if curves:
        ns = sorted({r["n"] for r in curves})
        picked = Table("best of n", *map(str, ns), title=f"accuracy of the answer that is picked ({curves[0]['questions']} questions)")
        for method in dict.fromkeys(r["method"] for r in curves):
            line = {r["n"]: r for r in curves if r["method"] == method}
            picked.add_row(method, *(f"{line[n]['accuracy']:.3f}" for n in ns))
        show(picked)
        for r in curves:
            if "calls_per_question" in r and r["n"] == ns[-1]:
                show(f"{r['method']} is asked {r['calls_per_question']} times to pick one of {r['n']}")
