"""Draws what a run's folder says for a terminal: the funnel, samples, one sample's whole history."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from factory.errors import GristmillError, StoreError
from factory.progress import dollars, duration
from factory.records import FunnelRow, RunFolder
from factory.store import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factory.dedup import Found
    from factory.ledger import By, Entry, Sum

LOST_SHOWN = 20  # the latest


def outcome(run: RunFolder) -> RenderableType:
    """The funnel, what became of the samples, what it cost and took, and how to go on."""
    status = run.status
    parts: list[RenderableType] = [funnel_table(run.funnel()), Text()]
    if balance := places_line(run):
        parts += [balance, Text()]
    if (short := shortfalls(status.get("cells", []))) is not None:
        parts += [short, Text()]
    if costs := costs_line(run):
        parts += [costs, Text()]
    good = status["status"] == "done"
    head = Text.assemble(
        (status["status"], "bold green" if good else "bold yellow"),
        f": {run.accepted.height} of {status.get('wanted', '?')} rows accepted",
        f" in {(n := status.get('rounds', 0))} round{'s' * (n != 1)}",
        f" · cost {dollars(status.get('micro_usd'))}",
        f" · {duration(status.get('seconds', 0))}",
    )
    if status.get("reason"):
        head.append(f"\n{status['reason']}", "yellow")
    warned = [alarm["sentence"] for alarm in status.get("alarms", []) if not alarm["stops"]]
    for sentence in dict.fromkeys(warned):
        head.append(f"\n{sentence}", "yellow")
    if lost := status.get("lost_micro_usd"):
        head.append(f"\nup to {dollars(lost)} of that may have been paid for answers that were lost when a process died", "yellow")
    return Group(*parts, head, Text(f"run: {run.path}"))


def funnel_table(funnel: list[FunnelRow], released: dict[str, int] | None = None) -> Table:
    """asked -> answered -> parsed -> each filter's rejects with their reasons -> accepted -> released."""
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for name in ("in", "out"):
        table.add_column(name, justify="right")
    table.add_column("lost on the way", overflow="fold")
    for row in funnel:
        if row.kind == "source":
            table.add_row(row.stage, str(row.made + row.lost.total()), str(row.made), reasons(row.lost))
        elif row.kind == "generator":
            notes = [reasons(row.unanswered), f"{row.from_ledger} from the ledger" if row.from_ledger else ""]
            table.add_row(f"{row.stage} asked", str(row.asked), str(row.answered), ", ".join(filter(None, notes)))
            parsed = row.lost - row.unanswered
            parsed.pop("unanswered", None)
            table.add_row(f"{row.stage} parsed", str(row.made + parsed.total()), str(row.made), reasons(parsed))
        elif row.kind == "filter":
            table.add_row(row.stage, str(row.judged), str(row.kept), reasons(row.rejected))
        else:
            table.add_row("accepted", str(row.judged), str(row.kept), reasons(row.rejected), style="bold")
    if released:
        table.add_row("released", "", str(sum(released.values())), ", ".join(f"{n} {split}" for split, n in released.items()), style="bold")
    return table


def reasons(counts: Counter[str]) -> str:
    """`12 too long, 3 copied`, the most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def places_line(run: RunFolder) -> Text | None:
    """Rows a place of the target, where it has several."""
    places = run.status.get("places") or {}
    if not places:
        return None
    return Text("accepted: " + ", ".join(f"{place} {have}/{wanted}" for place, (have, wanted) in sorted(places.items())))


def shortfalls(cells: list[dict[str, Any]]) -> Table | None:
    """What is short, what was tried for it, and what the rest would cost at the yield so far; None where nothing is."""
    short = [cell for cell in cells if cell["to_get"]]
    if not short:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("short", "rows", "calls", "good", "mostly lost to", "cost", "the rest would take"):
        table.add_column(name, justify="right" if name in ("rows", "calls", "good", "cost") else "left", overflow="fold")
    for cell in short:
        get = cell["to_get"]
        if get["calls"] is None:
            rest = "nobody knows: nothing good came" if cell["calls"] else "nobody knows: it was not asked for"
        else:
            rest = f"{get['calls']:,} calls" + ("" if get["micro_usd"] is None else f", {dollars(get['micro_usd'])}")
        lost = ", ".join(f"{n} {reason}" for reason, n in cell["rejected"].items())
        rows = f"{cell['have']}/{cell['wanted']}"
        table.add_row(cell["name"] or "rows", rows, f"{cell['calls']:,}", f"{cell['came']:,}", lost, dollars(cell["micro_usd"]), rest)
    return table


def costs_line(run: RunFolder) -> Text | None:
    """What an accepted row cost, by teacher, and at which label most; None where nothing cost anything."""
    if run.accepted.is_empty() or not run.cost_anything:
        return None
    teachers = [f"{name} {_a_row(each)}" for name, _, _, each in run.cost_by_teacher().iter_rows()]
    labels = run.cost_by(run.samples.filter(pl.col("origin") == "made").select("id", group="label"))
    told = labels.filter(pl.col("micro_usd_a_row").is_not_null())
    dearest = ""
    if told.height > 1:
        dearest = f"; dearest label: {told['group'][0]} {_a_row(told['micro_usd_a_row'][0])} (of the calls that gave rows)"
    return Text("an accepted row cost: " + ", ".join(teachers) + dearest)


def _a_row(micro_usd: float | None) -> str:
    if micro_usd is None:
        return "unknown"
    return dollars(round(micro_usd)) if micro_usd >= 100 or micro_usd == 0 else f"${micro_usd / 1e6:.2g}"


def pick(run: RunFolder, number: int, *, rejected: bool, reason: str | None, label: str | None) -> RenderableType:
    """Some samples, spread evenly over those that match."""
    chosen = run.samples.join(run.fates, on="id", maintain_order="left")
    wanted = (["rejected", "surplus"] if reason else ["rejected"]) if rejected else ["accepted"]
    chosen = chosen.filter(pl.col("fate").is_in(wanted))
    if reason:
        chosen = chosen.filter(pl.col("reason") == reason)
        if chosen.is_empty():
            known = run.fates.filter(pl.col("fate").is_in(wanted))["reason"].unique().sort().to_list()
            raise GristmillError(
                f"no sample was rejected as {reason!r}", next=f"Reasons of this run: {', '.join(map(str, known)) or 'none'}"
            )
    if label:
        chosen = chosen.filter(pl.col("label") == label)
    if chosen.is_empty():
        return Text("no such samples")
    step = max(chosen.height // max(number, 1), 1)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True)
    table.add_column("rejected" if rejected else "output", overflow="fold", max_width=44)
    table.add_column("input", overflow="fold")
    for row in chosen.gather_every(step).head(number).iter_rows(named=True):
        why = row["reason"] if rejected else row["output"]
        score = f" ({row['score']:.2f})" if rejected and row["score"] is not None else ""
        table.add_row(row["id"][:10], Text(f"{why}{score}"), Text(row["input"]))
    return table


def failed(run: RunFolder, number: int) -> RenderableType:
    """What never became a sample, with its reason and text."""
    if run.failures.is_empty():
        return Text("nothing failed")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "reason", "detail", "text"):
        table.add_column(name, overflow="fold")
    for row in run.failures.head(number).iter_rows(named=True):
        table.add_row(row["stage"], row["reason"], Text(f"{row['source'] or ''} {row['detail']}".strip()), Text(row["text"][:200]))
    return table


def history(run: RunFolder, prefix: str, home: Path) -> RenderableType:
    """One sample from its parents to its fate: what was shown, asked and answered, and every opinion about it."""
    found = run.samples.filter(pl.col("id").str.starts_with(prefix))
    if found.height != 1:
        raise GristmillError(
            f"{found.height} samples have an id that starts with {prefix!r}", next="Ids stand in the first column of `gristmill show`."
        )
    row = found.row(0, named=True)
    fate = run.fates.row(by_predicate=pl.col("id") == row["id"], named=True)
    facts = Table.grid(padding=(0, 2))
    for name in ("id", "kind", "label", "origin", "generator", "round", "teacher", "template", "source", "call"):
        if row[name] is not None:
            facts.add_row(name, Text(str(row[name])))
    for name in ("axes", "meta"):
        if row[name] != "{}":
            facts.add_row(name, Text(row[name]))
    facts.add_row("fate", Text(" ".join(str(fate[k]) for k in ("fate", "by", "reason") if fate[k])))
    parts: list[RenderableType] = [facts, Panel(_content(row), title="content", title_align="left")]
    parents = run.samples.filter(pl.col("id").is_in(row["parents"]))
    if parents.height:
        lines = Text("\n").join(Text(f"{p['id'][:10]}  {p['input']}  →  {p['output']}") for p in parents.iter_rows(named=True))
        parts.append(Panel(lines, title="parents: the samples that its prompt showed", title_align="left"))
    if row["call"]:
        parts += _asked(row["call"], home)
    opinions = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("by", "round", "keep", "score", "reason", "detail"):
        opinions.add_column(name, overflow="fold")
    for v in run.verdicts.filter(pl.col("sample") == row["id"]).iter_rows(named=True):
        score = "" if v["score"] is None else f"{v['score']:.3f}"
        opinions.add_row(
            v["by"],
            str(v["round"]),
            "keep" if v["keep"] else "reject",
            score,
            v["reason"] or "",
            Text("" if v["detail"] == "{}" else v["detail"]),
        )
    return Group(*parts, opinions)


def _content(row: dict[str, Any]) -> Text:
    if row["text"] is not None:
        return Text(row["text"])
    blocks = [(m["role"], m["content"]) for m in row["messages"]]
    blocks += [("chosen", m["content"]) for m in row["chosen"]] + [("rejected", m["content"]) for m in row["rejected"]]
    return Text("\n").join(Text.assemble((f"{role}: ", "bold"), content) for role, content in blocks)


def _asked(key: str, home: Path) -> list[RenderableType]:
    """The call that a sample was parsed from, out of the ledger."""
    from factory.ledger import open_ledger

    try:
        with open_ledger(home, read_only=True) as ledger:
            record = ledger.get(key)
    except StoreError as error:
        return [Text(f"what was asked can't be shown: {error.what}")]
    if record is None or record.answer is None:
        return []
    request = json.loads(record.question.request)
    asked = request.get("prompt") or "\n".join(f"{m['role']}: {m['content']}" for m in request.get("messages", []))
    title = f"answered ({record.question.provider}, {record.question.model}, {dollars(record.answer.micro_usd)})"
    answer = Panel(Text(record.answer.reply.text), title=title, title_align="left")
    return [Panel(Text(asked), title="asked", title_align="left"), answer]


def released(run: RunFolder, version: Path) -> RenderableType:
    """The funnel down to the released rows, what it cost and took, and where everything lies."""
    manifest = read_json(version / "manifest.json")
    splits = {Path(name).stem: entry["rows"] for name, entry in manifest["files"].items() if name.endswith(".jsonl")}
    status = run.status
    lines = Text.assemble(
        ("released ", "bold green"),
        f"{sum(splits.values())} rows as {manifest['name']} v{manifest['version']}",
        f" · cost {dollars(manifest['micro_usd'])} · run took {duration(status.get('seconds', 0))}\n",
        *((f"{note}\n", "yellow") for note in manifest.get("notes", ())),
        f"dataset: {version}\nreport:  {version / 'report.html'}",
    )
    return Group(funnel_table(run.funnel(), splits), Text(), lines)


def ledger_table(home: Path, by: Sequence[By] = ("run", "teacher")) -> RenderableType:
    """Calls, tokens and money by each of these, their total, and below it what may have been paid for and never came."""
    from factory.ledger import open_ledger

    with open_ledger(home, read_only=True) as ledger:
        grouped = {one: ledger.sums(one) for one in by}
        lost = ledger.lost()
    sums = [(f"{one} {row.name}", row) for one, rows in grouped.items() for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "answers", "failed", "lost", "open", "tokens in", "tokens out", "cost"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in [*sums, ("total", _total(grouped[by[0]]))]:
        cost = dollars(row.micro_usd) + (f" + {row.unpriced} unpriced" if row.unpriced else "")
        counts = (row.settled, row.failed, row.lost, row.open, row.tokens_in, row.tokens_out)
        table.add_row(name, *(f"{n:,}" for n in counts), cost, style="bold" if name == "total" else None)
    return Group(table, *_lost(lost)) if lost else table


def _total(sums: Sequence[Sum]) -> Sum:
    from factory.ledger import Sum

    numbers = [name for name in Sum.__dataclass_fields__ if name != "name"]
    return Sum("total", *(sum(getattr(row, name) for row in sums) for name in numbers))


def _lost(entries: Sequence[Entry]) -> list[RenderableType]:
    unpriced = sum(entry.reserved_micro_usd is None for entry in entries)
    most = dollars(sum(entry.reserved_micro_usd or 0 for entry in entries)) + (f" (and {unpriced} of unknown price)" if unpriced else "")
    answers = "1 answer" if len(entries) == 1 else f"{len(entries):,} answers"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("entry", "run", "stage", "teacher", "asked at", "at most", "why"):
        table.add_column(name, justify="right" if name in ("entry", "at most") else "left", overflow="fold")
    for entry in entries[-LOST_SHOWN:]:
        price = dollars(entry.reserved_micro_usd)
        table.add_row(str(entry.id), entry.run, entry.stage, entry.teacher, entry.opened_at[:19], price, Text(entry.error or ""))
    parts: list[RenderableType] = [Text(f"\nup to {most} may have been paid for {answers} that never came:"), table]
    if len(entries) > LOST_SHOWN:
        parts.append(Text(f"and {len(entries) - LOST_SHOWN:,} before them; `gristmill ledger export` writes them all"))
    return parts


def duplicates(found: Found, out: Path | None) -> RenderableType:
    """What `gristmill dedup` found: how many rows go by which filter, and the pairs nearest to each cut."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_row("read", f"{len(found.rows):,}")
    from factory.dedup import UNREADABLE

    by = Counter(one.by for one in found.dropped)
    for name, count in by.items():
        what = {"exact": "the same to the letter", UNREADABLE: UNREADABLE}.get(name, f"the same by {name}")
        table.add_row(what, f"-{count:,}")
    table.add_row("stay", f"{len(found.kept):,}")
    parts: list[RenderableType] = [table]
    if found.unreadable:
        reasons = Counter(one.reason for one in found.unreadable)
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        parts.append(Text(f"\n{len(found.unreadable):,} rows could not be compared ({told}); unreadable ones go, others stay"))
    for name, report in found.reports.items():
        parts += [
            Text(f"\n{name}: {large['rows']:,} rows say what {large['sample'][:12]} says: more than one would expect")
            for large in report.get("groups", {}).get("larger_than_expected", [])
        ]
        for side, what in (("above", "just alike enough to be one"), ("below", "just not alike enough")):
            if pairs := report.get("nearest_the_cut", {}).get(side, [])[:3]:
                parts.append(Text(f"\n{name}: {what}", style="bold"))
                for pair in pairs:
                    one, other = (short(found.texts.get(pair[end], pair[end])) for end in ("twin", "sample"))
                    parts.append(Text(f"  {pair['likeness']:.3f}  {one}\n         {other}"))
    parts.append(
        Text(
            f"\nwrote {len(found.kept):,} rows to {out}"
            if out
            else "\nNothing was written: --out FILE writes what stays, --dropped FILE what goes."
        )
    )
    return Group(*parts)


def short(text: str) -> str:
    """A text on one line of at most 110 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 110 else f"{text[:109]}…"
