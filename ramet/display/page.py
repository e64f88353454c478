"""`report.html` of a frontier: one self-contained page that plots accuracy against a cost of the reader's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ramet.display.report import STYLE, table
from ramet.storage import write_text

SCRIPT = Path(__file__).with_name("page.js")
_MORE = """
#plot { width: 100%; height: auto; } .tick { font-size: 12px; fill: currentColor; } .key { font-size: 13px; cursor: pointer; }
label { margin-right: 1.2rem; }
"""


def write_page(path: Path, title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the page: the plot, differences at matched cost, areas under the frontier, and the machine that it was measured on."""
    points = [r for r in records if r["record"] == "point"]
    # "<" is escaped so that no name can end the script element.
    data = json.dumps(points, allow_nan=False).replace("<", "\\u003c")
    parts = [
        f"<h1>{escape(title)}</h1><p>Accuracy with 95% intervals against the cost of a task. Point at a dot for its numbers; "
        "click a name to hide it.</p><p>",
        *(f'<label>{name} <select id="{name}"></select></label>' for name in ("metric", "split", "cost")),
        '<label><input type="checkbox" id="log" checked> logarithmic</label></p>',
        '<svg id="plot" viewBox="0 0 860 420" role="img" aria-label="accuracy against cost"></svg>',
    ]
    compared = [r for r in records if r["record"] == "matched"]
    if compared:
        rows = [
            [
                r["metric"], r["split"], r["baseline"], str(r["budget"]), f"{r['baseline_cost']:.0f}",
                *(
                    ("", "costs more at any budget", "")
                    if r["difference"] is None
                    else (
                        f"{r['winner_cost']:.0f}",
                        f"{r['difference']:+.3f} [{r['ci_low']:+.3f}, {r['ci_high']:+.3f}]",
                        f"{r['p_value']:.3f}, {r['p_holm']:.3f}",
                    )
                ),
            ]
            for r in compared
        ]  # fmt: skip
        winner = compared[0]["policy"]
        headers = ["metric", "split", "baseline", "its budget", "generated", f"{winner} generated", "difference", "p, corrected"]
        parts.append(f"<h2>{escape(winner)} for at most what each baseline spent</h2>" + table(headers, rows))
    areas = [r for r in records if r["record"] == "area"]
    rows = [[r["metric"], r["split"], r["cost"], r["policy"], f"{r['area']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]"] for r in areas]
    parts.append("<h2>Area under the frontier</h2>" + table(["metric", "split", "cost", "method", "area"], rows))
    for r in records:
        if r["record"] == "meta":
            about = f"{r['command']}, seed {r['seed']}, ramet {r['version']}, {r['machine']['cpu']}, {r['time']}"
            parts.append(f'<p class="note">{escape(about)}</p>')
    parts.append(f'<script type="application/json" id="points">{data}</script><script>{SCRIPT.read_text(encoding="utf-8")}</script>')
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}{_MORE}</style>'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n')
