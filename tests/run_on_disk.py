"""A small finished run, on disk as the engine leaves one: for tests of what reads runs and makes none."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from factory.records import LAYOUT, RunFolder
from factory.store import VERDICTS, failures_frame, samples_frame, verdicts_frame, write_bytes, write_frame, write_json
from schemas.manifest import ReleaseFacts, TeacherFacts
from schemas.sample import Failure, Message, Provenance, Sample
from schemas.verdict import Verdict

SEEDS = Path(__file__).parents[1] / "examples" / "bank-intents" / "seeds.jsonl"
FILTERS = ("03-rules", "04-near", "05-fits", "06-coverage")

# What a teacher might have said; two labels are left thin on purpose.
LINES: dict[str, tuple[str, ...]] = {
    "failed_transfer": (
        "The payment to my landlord bounced back twice today, what is wrong with it?",
        "An error pops up each time I try sending cash to Spain.",
        "Money I sent to my brother never left, it says unsuccessful.",
        "Please explain why the wire I set up last night did not work.",
    ),
    "declined_transfer": (
        "You declined the payment I made to the garage, how come?",
        "My transfer was refused although there is enough in the account.",
        "Did the bank reject what I tried to send this morning?",
        "Is there a limit that made you decline sending 900 pounds?",
    ),
    "transfer_timing": (
        "How many days until a payment to Germany arrives?",
        "If I send money on Friday night, will it be there on Monday?",
        "When should the funds to my US account show up at the other end?",
        "Roughly how long do international payments take with you?",
    ),
    "pending_transfer": (
        "The payment is still marked pending after three days.",
        "Why does my transaction keep saying in progress?",
        "Status of what I sent to my sister has not moved from waiting.",
        "Can you push through a transfer that hangs as pending since Tuesday?",
    ),
    "cancel_transfer": (
        "I typed the wrong amount, stop that payment please!",
        "Can I still undo the transfer from ten minutes ago?",
        "Take back the money I sent to the wrong person.",
        "How do I call off a standing payment that goes out tonight?",
    ),
    "beneficiary_not_allowed": (
        "Your app says this recipient is not permitted.",
        "Adding my cousin's account as a payee gets blocked, why?",
        "It tells me the beneficiary cannot be used.",
    ),
    "transfer_fee_charged": (
        "There is an extra pound taken off for sending money, what is that?",
        "I was told payments are free and yet I paid a fee.",
        "What will I be charged when I wire 2000 dollars abroad?",
        "Could you refund the commission on yesterday's transfer?",
    ),
    "transfer_into_account": (
        "What details do I give my employer so that my wage lands here?",
        "How do I top this account up from my savings at another bank?",
        "Is it possible to move funds in from my old bank by wire?",
        "Which sort code must people use to pay me?",
    ),
    "balance_not_updated_after_bank_transfer": (
        "I sent money in from my other bank and the balance is the same as before.",
        "My account total did not go up after the deposit by wire.",
        "Where is the bank transfer I made to myself, it does not show?",
        "The sum I see has not changed although my dad paid in on Monday.",
    ),
    "transfer_not_received_by_recipient": (
        "My friend says that nothing has arrived from me.",
        "The shop never got the payment I made a week ago.",
    ),
}
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert('in')</script> {{ 7*7 }} & \"quoted\""


def chat(text: str, label: str | None, **provenance: Any) -> Sample:
    where = Provenance.model_validate({"origin": "made", "generator": "02-compose", "round": 1, "teacher": "small", **provenance})
    turns = [Message(role="user", content=text), *([Message(role="assistant", content=label)] if label else [])]
    return Sample(messages=tuple(turns), label=label, provenance=where)


def seeds(holdouts: int = 10) -> list[Sample]:
    """The example's 40 seeds, the first `holdouts` labels' first row set aside for test."""
    read = []
    held: set[str] = set()
    for number, line in enumerate(SEEDS.read_text().splitlines(), 1):
        turns = [turn["content"] for turn in json.loads(line)["messages"]]
        sample = chat(turns[0], turns[1], origin="real", generator="01-seeds", round=0, teacher=None, source=f"seeds.jsonl:{number}")
        hold = turns[1] not in held and len(held) < holdouts
        held |= {turns[1]} if hold else set()
        read.append(sample.model_copy(update={"holdout": hold, "meta": {"source": "banking77/train"}}))
    return read


def made(real: Sequence[Sample], lines: Mapping[str, Sequence[str]] = LINES, teachers: Sequence[str] = ("small", "big")) -> list[Sample]:
    """One sample a line, with parents among the seeds that were shown, axes, and a round: the first two of a label are of round 1."""
    samples = []
    for label, texts in lines.items():
        parents = tuple(seed.id for seed in real if seed.label == label and not seed.holdout)
        for number, text in enumerate(texts):
            axes = {"tone": ("curt", "polite", "angry")[number % 3]}
            where = {"round": 1 + number // 2 % 2, "parents": parents, "teacher": teachers[number % len(teachers)], "axes": axes}
            samples.append(chat(text, label, call=f"c1{len(samples):032x}", template="classify.j2", **where))
    return samples


def rejected(real: Sequence[Sample], kept: Sequence[Sample]) -> tuple[list[Sample], list[Verdict]]:
    """Samples that filters turned down, each in a way that the report shows otherwise, and the verdicts on them."""
    twin, seed = kept[0], next(seed for seed in real if not seed.holdout)
    out = [
        (chat(twin.input.replace("today", "this day"), twin.label), "04-near", "near_duplicate", 0.86, {"twin": twin.id}),
        (chat(kept[5].input + " Why?", kept[5].label), "04-near", "near_duplicate", 0.81, {"twin": kept[5].id}),
        (chat(seed.input + "!!", seed.label), "03-rules", "copies_seed", 0.98, {"twin": seed.id}),
        (chat("ok", "pending_transfer"), "03-rules", "too_short", 1.0, {}),
        (chat("As an AI language model I can't send money.", "failed_transfer"), "03-rules", "refusal", None, {}),
        (chat("What is the weather like in Oslo?", "transfer_timing"), "05-fits", "nearest_other_label", 0.08, {"nearest": "none"}),
        (chat(HOSTILE, "cancel_transfer"), "05-fits", "nearest_other_label", 0.19, {"nearest": "failed_transfer"}),
        (chat("Where is my money, it shows as pending?", "cancel_transfer"), "05-fits", "unsure", 0.29, {"nearest": "pending_transfer"}),
    ]
    return [row[0] for row in out], [
        Verdict(sample=s.id, by=by, keep=False, reason=why, score=score, detail=d) for s, by, why, score, d in out
    ]


def write_run(
    folder: Path,
    real: Sequence[Sample],
    new: Sequence[Sample],
    verdicts: Sequence[Verdict],
    failures: Sequence[Failure] = (),
    *,
    filters: Sequence[str] = FILTERS,
    surplus: Sequence[str] = (),
    quota: int = 4,
    status: str = "done",
) -> RunFolder:
    """Write a run as the engine does. Where no verdict of a filter on a sample is given, it keeps it, the last filter with its cluster."""
    given = {(verdict.by, verdict.sample): verdict for verdict in verdicts}
    labels = sorted({sample.label for sample in real if sample.label})
    out = {verdict.sample for verdict in verdicts if not verdict.keep}
    staying = [sample for sample in new if sample.id not in out]
    _write_stage(folder / "round-00" / "01-seeds", "source", samples=real)
    for number in sorted({sample.provenance.round for sample in new}):
        there = folder / f"round-{number:02d}"
        rows = [sample for sample in new if sample.provenance.round == number]
        here = [failure for failure in failures if number == 1]
        _write_stage(there / "02-compose", "generator", samples=rows, failures=here)
        for by in filters:
            said = [given.get((by, s.id)) or _keep(by, s, staying, labels, by == filters[-1]) for s in rows]
            pool = [seed for seed in real if by == filters[-1] and not seed.holdout]
            _write_stage(there / by, "filter", verdicts=[*said, *(_keep(by, seed, staying, labels, True) for seed in pool)])
            kept = {verdict.sample for verdict in said if verdict.keep}
            rows = [sample for sample in rows if sample.id in kept]
        full = [Verdict(sample=s.id, by="target", keep=s.id not in surplus, reason="full" if s.id in surplus else None) for s in rows]
        _write_stage(there / "target", "target", verdicts=full)
    accepted = RunFolder(folder).accepted
    places = {label: [accepted.filter(pl.col("label") == label).height, quota] for label in labels}
    seconds, wanted = 192.4, quota * max(1, len(labels))
    run = {"name": "bank", "status": status, "reason": "the target is met" if status == "done" else "two labels gave nothing more"}
    write_json(
        folder / "run.json",
        {"layout": LAYOUT, **run, "wanted": wanted, "places": places, "rounds": 2, "micro_usd": 12_345, "seconds": seconds},
    )
    write_bytes(folder / "recipe.yaml", b"name: bank\n")
    return RunFolder(folder)


def bank_run(folder: Path, **changes: Any) -> RunFolder:
    """The run that most tests read: 40 seeds, 10 of them set aside; 36 made rows that stay, 8 rejected, one surplus, 3 failures."""
    real = seeds()
    good = made(real)
    bad, verdicts = rejected(real, good)
    failures = [
        Failure(reason="unparsed", detail="no list in the answer", text="Sure! Here you go", teacher="small", call="c1" + "e" * 32),
        Failure(reason="unparsed", detail="the last item was cut", text='["Where is', teacher="small", call="c1" + "d" * 32),
        Failure(reason="repeat", detail=f"same content as {good[0].id}", text=good[0].input, teacher="big", call="c1" + "f" * 32),
    ]
    return write_run(folder, real, [*good, *bad], verdicts, failures, surplus=[good[-3].id], **changes)


def facts(**changes: Any) -> ReleaseFacts:
    small = TeacherFacts(
        name="small", kind="local", model="smollm2-135m-instruct", licence="Apache-2.0", calls=12, tokens_in=4000, micro_usd=0
    )
    big = TeacherFacts(
        name="big", kind="openai", model="gpt-4o-mini", calls=8, from_ledger=2, tokens_in=3000, tokens_out=700, micro_usd=12_345
    )
    teachers = (small, big)
    recipe = {"name": "bank", "target": {"accepted": 40, "balance": "label"}}
    return ReleaseFacts.model_validate(
        {"recipe": recipe, "embedder": "all-MiniLM-L6-v2", "teachers": teachers, "seeds_licence": "CC BY 4.0", **changes}
    )


def _keep(by: str, sample: Sample, others: Sequence[Sample], labels: Sequence[str], covers: bool) -> Verdict:
    if covers:
        label = sample.label or labels[0] if labels else ""
        detail = {"cluster": labels.index(label) if label else 0, "name": ", ".join(label.split("_")[:3]) or "everything"}
        return Verdict(sample=sample.id, by=by, keep=True, score=0.7, detail=detail)
    if not by.endswith(("near", "semantic")):
        return Verdict(sample=sample.id, by=by, keep=True, score=0.4 if by.endswith("fits") else None)
    likeness, twin = max(((_likeness(sample, other), other.id) for other in others if other.id != sample.id), default=(None, None))
    return Verdict(sample=sample.id, by=by, keep=True, score=likeness, detail={"twin": twin})


def _likeness(a: Sample, b: Sample) -> float:
    one, two = (set(re.findall(r"\w+", sample.input.lower())) for sample in (a, b))
    return len(one & two) / max(1, len(one | two))


def _write_stage(
    folder: Path, kind: str, *, samples: Sequence[Sample] = (), failures: Sequence[Failure] = (), verdicts: Sequence[Verdict] = ()
) -> None:
    asked = len(samples) // 3 + 2 if kind == "generator" else 0
    if kind in ("source", "generator"):
        write_frame(folder / "samples.parquet", samples_frame(samples))
        write_frame(folder / "failures.parquet", failures_frame(failures))
    else:
        write_frame(folder / "verdicts.parquet", verdicts_frame(verdicts) if verdicts else VERDICTS.to_frame())
    stage = {
        "stage": folder.name,
        "kind": kind,
        "round": int(folder.parent.name.removeprefix("round-")),
        "asked": asked,
        "answered": max(0, asked - 1),
        "unanswered": {"timed out": 1} if asked else {},
        "made": len(samples),
        "lost": Counter(failure.reason for failure in failures),
        "judged": len(verdicts),
        "kept": sum(verdict.keep for verdict in verdicts),
        "rejected": Counter(verdict.reason or "no reason" for verdict in verdicts if not verdict.keep),
        "micro_usd": 6_000 if asked else 0,
        "tokens_in": 3_500 if asked else 0,
        "tokens_out": 800 if asked else 0,
        "seconds": 80.0 if asked else 0.5,
        "reports": {},
    }
    write_json(folder / "stage.json", stage)
