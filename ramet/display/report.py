"""`report.html` of a comparison: one self-contained page with its pictures, which needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ramet.display.plots import LABELS, SPLITS
from ramet.storage import write_text

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; }
img { max-width: 100%; background: white; }
pre { background: #8881; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.note { color: #888; font-size: .9rem; }
"""


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; all texts are escaped."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def points_table(records: Sequence[dict[str, Any]], split: str) -> str:
    """The accuracy of each policy at each budget of a split, with its interval, in HTML."""
    points = [r for r in records if r["record"] == "point" and r["split"] == split]
    budgets = sorted({p["budget"] for p in points})
    rows = []
    for policy in LABELS:
        own = {p["budget"]: p for p in points if p["policy"] == policy}
        if own:
            rows.append(
                [LABELS[policy]]
                + [f"{p['accuracy']:.3f} [{p['ci_low']:.3f}, {p['ci_high']:.3f}]" if (p := own.get(b)) else "" for b in budgets]
            )
    return table(["policy", *(f"{b} tokens" for b in budgets)], rows)


def costs_table(records: Sequence[dict[str, Any]], split: str) -> str:
    """Accuracy, tokens, critical path and spawn rate of each policy at the largest budget of a split, in HTML."""
    points = [r for r in records if r["record"] == "point" and r["split"] == split]
    largest = max(p["budget"] for p in points)
    rows = [
        [
            LABELS[p["policy"]],
            f"{p['accuracy']:.3f}",
            f"{p['generated']:.0f}",
            f"{p['critical_path']:.0f}",
            f"{p['prefilled']:.0f}",
            f"{p['spawn_rate']:.0%}",
        ]
        for policy in LABELS
        for p in points
        if p["policy"] == policy and p["budget"] == largest
    ]
    return table(["policy", "accuracy", "generated", "critical path", "prefilled", "spawn rate"], rows)


def write_report(path: Path, title: str, intro: str, records: Sequence[dict[str, Any]], pictures: Sequence[Path], tree: str = "") -> None:
    """Write the page; pictures that do not exist are left out. `tree` is preformatted text of one tree."""
    splits = [s for s in SPLITS if any(r["record"] == "point" and r["split"] == s for r in records)]
    parts = [f"<h1>{escape(title)}</h1><p>{escape(intro)}</p>"]
    for picture in pictures:
        if picture.exists():
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<p><img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}"></p>')
    for split in splits:
        parts.append(f"<h2>Accuracy by budget: {escape(SPLITS[split])}</h2>{points_table(records, split)}")
        parts.append(f"<h2>Cost at the largest budget: {escape(SPLITS[split])}</h2>{costs_table(records, split)}")
    if tree:
        parts.append(f"<h2>One tree on a held-out problem</h2><pre>{escape(tree)}</pre>")
    for record in records:
        if record["record"] == "meta":
            parts.append(f'<p class="note">{escape(record["command"])}, seed {record["seed"]}, ramet {escape(record["version"])}, ')
            parts.append(f"{escape(record['machine']['cpu'])}, {record['machine']['threads']} threads, {escape(record['time'])}</p>")
    parts.append('<p class="note">Brackets are 95% intervals, clustered by task, of each accuracy by itself.</p>')
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
    write_text(path, page + "".join(parts) + "</body></html>\n")
