"""Writes what docs/loop.md says was measured, and docs/loop.svg, from bench/results/loop.json: `python docs/loop.py`."""

from __future__ import annotations

import html
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- measured: written by docs/loop.py -->\n", "<!-- end -->"
CLOSED, OPEN, INK, PALE = "#2f7f7b", "#d9804a", "#33312b", "#e6e3da"
NAMES = {
    "balance": "rows of the smallest label by those of the largest",
    "cluster_entropy": "evenness over 64 regions of the development rows",
    "novelsum": "NovelSum",
    "probe": "accuracy of a probe on the development rows",
}


def tables(results: dict[str, Any]) -> str:
    """Both cases: means, and differences with their intervals."""
    runs, found = results["embedded"]["runs"], results["embedded"]
    spent = {side: statistics.mean(run[side]["tokens_out"] for run in runs) for side in ("closed", "open")}
    rows = statistics.mean(run["closed"]["rows"] for run in runs)
    good = statistics.mean(run["open"]["good"] for run in runs)
    lines = [
        f"**The embedded teacher** (135M parameters, the demo's recipe for half of its rows, {len(runs)} seeds): {rows:.0f} rows from",
        f"{spent['closed']:,.0f} tokens in the closed loop; in the open one, of questions asked evenly over labels, as many rows drawn at",
        f"random from the good ones of as many tokens ({good:.0f} on average).\n",
        "| | closed | open | difference, 95% interval |",
        "| --- | --- | --- | --- |",
    ]
    for name, said in NAMES.items():
        gap, means = found["differences"][name], found["means"]
        interval = f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        lines.append(f"| {said} | {means[f'closed_{name}']:.3f} | {means[f'open_{name}']:.3f} | {interval} |")
    alone = statistics.mean(run["seeds_alone"] for run in runs)
    lines.append(f"\nSeeds alone score {alone:.3f}.\n")
    found = results["noisy"]
    means, gaps = found["means"], found["differences"]
    lines += [
        "**A strong teacher that can't be trusted** (one answer in four of another label, one in six a near-duplicate or rubbish;",
        f"{len(found['runs'])} seeds, five folds each):\n",
        "| trained on the seeds and | accuracy | the loop's rows against it, 95% interval |",
        "| --- | --- | --- |",
        f"| nothing else | {means['seeds_alone']:.3f} | {_gap(gaps['loop_against_seeds_alone'])} |",
        f"| as many rows as they come | {means['unfiltered']:.3f} | {_gap(gaps['loop_against_unfiltered'])} |",
        f"| the loop's rows | {means['loop']:.3f} | |",
        f"| as many clean rows | {means['clean']:.3f} | {_gap(gaps['loop_against_clean'])} |",
    ]
    return "\n".join(lines) + "\n"


def _gap(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"


def picture(results: dict[str, Any]) -> str:
    """Rows by label, closed beside open, and how the closed run filled from round to round: means over seeds."""
    runs = results["embedded"]["runs"]
    labels = sorted(runs[0]["closed"]["by_label"])
    counts = {side: {label: [run[side]["by_label"][label] for run in runs] for label in labels} for side in ("closed", "open")}
    most = max(max(of) for side in counts.values() for of in side.values())
    wide, high, left = 360, 26 * len(labels), 250
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 {high + 90}" font-family="sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="1000" height="{high + 90}" fill="white"/>',
        '<text x="20" y="26" font-weight="bold">Accepted rows of each label (bar: mean, line: from least to most over seeds)</text>',
    ]
    for number, label in enumerate(labels):
        y = 50 + 26 * number
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(label.replace("_", " ")[:40])}</text>')
        for place, (side, colour) in enumerate((("closed", CLOSED), ("open", OPEN))):
            of = counts[side][label]
            mean, top = statistics.mean(of) / most * wide, y + 10 * place
            low, far = min(of) / most * wide, max(of) / most * wide
            parts.append(f'<rect x="{left}" y="{top}" width="{mean:.1f}" height="9" fill="{colour}"/>')
            parts.append(f'<path d="M{left + low:.1f} {top + 4.5}H{left + far:.1f}" stroke="{INK}"/>')
    y = high + 70
    for place, (side, colour) in enumerate((("closed loop", CLOSED), ("open loop, as many tokens", OPEN))):
        parts.append(f'<rect x="{left + 150 * place}" y="{y - 10}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 16 + 150 * place}" y="{y}">{side}</text>')
    parts.append('<text x="680" y="26" font-weight="bold">The closed loop, round by round</text>')
    longest, wanted = max(len(run["filling"]) for run in runs), max(run["closed"]["rows"] for run in runs)
    step, top, bottom = 270 / max(longest, 2), 50, high + 40
    parts.append(f'<path d="M690 {top}V{bottom}H970" stroke="{INK}" fill="none"/>')
    for run in runs:
        points = [(690, bottom)]
        points += [(690 + step * (n + 1), bottom - (bottom - top) * each["accepted"] / wanted) for n, each in enumerate(run["filling"])]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" stroke="{CLOSED}" fill="none" opacity="0.7" stroke-width="2"/>')
    parts.append(f'<text x="684" y="{top + 5}" text-anchor="end">{wanted:.0f}</text>')
    parts += [f'<text x="{690 + step * (n + 1):.0f}" y="{bottom + 18}" text-anchor="middle">{n + 1}</text>' for n in range(longest)]
    parts.append(f'<text x="830" y="{bottom + 38}" text-anchor="middle">accepted rows after each round, a line a seed</text>')
    return "\n".join([*parts, "</svg>\n"])


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results."""
    before, _, rest = text.partition(START)
    return before + START + "\n" + tables(results) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Write docs/loop.md and docs/loop.svg."""
    path = ROOT / "docs" / "loop.md"
    results = json.loads((ROOT / "bench" / "results" / "loop.json").read_text(encoding="utf-8"))
    path.write_text(page(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    (ROOT / "docs" / "loop.svg").write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
