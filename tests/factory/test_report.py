import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from factory import report
from factory.diversity import diversity, hash_order
from factory.records import COSTS, RunFolder
from factory.report import write_report
from factory.show import outcome
from factory.store import samples_frame, write_frame
from schemas.manifest import ReleaseFacts
from schemas.sample import Provenance, Sample
from schemas.verdict import Verdict
from tests.context import embedder
from tests.run_on_disk import HOSTILE, bank_run, chat, facts, seeds, write_run

LIMIT_BYTES = 6_000_000


def embed(texts):
    return embedder().embed(texts)


class Page(HTMLParser):
    """A page as a browser takes it apart: its elements, their attributes, and the text of each section."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.sections = [], [], {}
        self.section, self.inside = "head", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "script":
            self.scripts.append("")
        self.sections[self.section] = self.sections.get(self.section, "") + " "

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        else:
            self.sections[self.section] = self.sections.get(self.section, "") + data

    def text(self, section):
        return " ".join(self.sections[section].split())

    @property
    def payload(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return bank_run(tmp_path_factory.mktemp("runs") / "bank-00000000")


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, run, embed, title="bank v1", facts=facts(), splits={run.accepted["id"][0]: "test"})
    return path


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text())


def test_the_page_asks_nothing_of_any_network(path, page):
    html = path.read_text()
    assert len(html.encode()) < LIMIT_BYTES
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", html)
    links = [
        (tag, value) for tag, attrs in page.elements for name, value in attrs.items() if name in ("src", "href", "srcset", "action", "data")
    ]
    assert links
    assert all(tag == "a" and value.startswith("#") for tag, value in links)
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    anchors = {value[1:] for _, value in links}
    assert anchors <= {attrs["id"] for tag, attrs in page.elements if tag == "section"}


def test_only_its_own_script_may_run(page):
    policy = next(
        attrs["content"] for tag, attrs in page.elements if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ")[:2] == ["default-src 'none'", f"script-src 'sha256-{digest}'"]
    assert data.startswith("{")


def test_a_hostile_sample_is_inert_and_shown_as_it_is(path, page):
    html = path.read_text()
    assert "<img" not in html
    assert html.count("<script") == html.count("</script") == 2
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert HOSTILE in page.payload["text"]
    assert " ".join(HOSTILE.split()) in page.text("rejects")
    assert "49" not in page.text("rejects")  # {{ 7*7 }} is text, not a template
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", page.scripts[1])


def test_the_counts_are_those_of_the_run(run, page):
    fates = dict(run.fates["fate"].value_counts().iter_rows())
    head = page.text("head")
    assert f"{fates['accepted']} rows accepted of {45 + 1 - 1} made" in head
    assert f"from {fates['real']} real examples; {fates['holdout']} more were set aside" in head
    assert "$0.0123" in head
    payload = page.payload
    assert len(payload["text"]) == run.samples.height
    shown = {name: payload["fate"]["of"].count(number) for number, name in enumerate(payload["fate"]["names"])}
    assert shown == fates
    assert payload["split"] == {"names": ["test"], "of": payload["split"]["of"]}
    assert sorted(payload["split"]["of"]) == [-1] * (run.samples.height - 1) + [0]


def test_the_funnel_adds_up(run, page):
    text = page.text("funnel")
    assert "02-compose asked 18 questions; 16 were answered, and gave 45 samples and 3 pieces that were none." in text
    steps = [("made", 45, 3), ("03-rules", 42, 3), ("04-near", 40, 2), ("05-fits", 37, 3)]
    for name, left, out in steps:
        assert f"{name} {left} −{out}" in text
    assert "06-coverage 37" in text
    assert "target 36 −1 1 full" in text
    assert "accepted 36" in text
    for row in run.funnel():
        for reason, n in row.rejected.items():
            assert f"{n} {reason.replace('_', ' ')}" in text


def test_balance_shows_what_was_asked_for_and_names_the_thin_places(run, page):
    text = page.text("balance")
    assert "transfer not received by recipient 2 / 4 +3 real" in text
    assert "cancel transfer 4 / 4 +3 real" in text
    assert "Labels that lack rows: transfer not received by recipient 2 of 4, " in text
    curt = [frame.filter(pl.col("axes").str.contains("curt")).height for frame in (run.accepted, run.samples)]
    assert f"curt {curt[0]} / {curt[1]}" in text


def test_rejects_show_their_reason_score_and_twin(run, page):
    text = page.text("rejects")
    assert "04-near rejected 2 of 42" in text
    assert "near duplicate 2 score 0.810 to 0.860" in text
    twin = run.accepted["input"][0]
    assert "03-rules rejected 3 of 45" in text
    assert "too short 1 score 1.000" in text
    pairs = page.text("twins")
    assert "0.810" in pairs
    assert pairs.index("Kept, and most alike") < pairs.index("Rejected, and least alike")
    assert twin.split()[0] in pairs


def test_cost_is_told_by_teacher_and_row(run, page):
    accepted = dict(run.accepted["teacher"].value_counts().iter_rows())
    text = page.text("cost")
    made = dict(run.samples.filter(pl.col("origin") == "made")["teacher"].value_counts().iter_rows())
    assert f"big gpt-4o-mini not stated 8 3,000 700 {made['big']} {accepted['big']} $0.0123" in text
    assert f"small smollm2-135m-instruct Apache-2.0 12 4,000 0 {made['small']} {accepted['small']} $0.00 $0.00" in text


def priced(run, micro_usd):
    """The run, with so much paid for each call that made its samples."""
    for folder in run.path.glob("round-*/02-compose"):
        made = pl.read_parquet(folder / "samples.parquet").drop_nulls("call")
        costs = made.select("call", "teacher", micro_usd=pl.lit(micro_usd, pl.Int64), aim=pl.lit("")).unique()
        write_frame(folder / "costs.parquet", costs.cast(dict(COSTS)))
    return RunFolder(run.path)


def test_what_an_accepted_row_cost_is_told_by_teacher_label_and_cluster(tmp_path):
    run = priced(bank_run(tmp_path / "run"), 1000)
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=facts())
    text = Page((tmp_path / "r.html").read_text()).text("cost")
    big = run.accepted.filter(pl.col("teacher") == "big").height
    asked = run.costs.filter(pl.col("teacher") == "big").height
    assert asked > big > 0
    assert f"big ${asked * 0.001:.4f} {big} ${asked * 0.001 / big:.4f}" in text
    assert "Label Cost Accepted A row" in text
    assert "cancel transfer $0.0040 4 $0.0010" in text
    assert "Cluster Cost Accepted A row" in text
    said = io.StringIO()
    Console(width=300, file=said).print(outcome(run))
    assert f"an accepted row cost: big ${asked * 0.001 / big:.4f}, small " in said.getvalue()
    assert "; dearest label: " in said.getvalue()


def test_where_nothing_cost_anything_no_table_says_so(tmp_path):
    run = priced(bank_run(tmp_path / "run"), 0)
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=facts())
    assert "An accepted row" not in Page((tmp_path / "r.html").read_text()).text("cost")
    said = io.StringIO()
    Console(width=300, file=said).print(outcome(run))
    assert "an accepted row cost" not in said.getvalue()


def test_an_unknown_price_is_unknown_by_row_as_well(tmp_path):
    run = priced(bank_run(tmp_path / "run"), None)
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=facts())
    assert re.search(r"Label Cost Accepted A row .*cancel transfer unknown 4 –", Page((tmp_path / "r.html").read_text()).text("cost"))
    said = io.StringIO()
    Console(width=300, file=said).print(outcome(run))
    assert "an accepted row cost: big unknown, small unknown" in said.getvalue()


def test_failures_are_counted_and_quoted(page):
    text = page.text("failures")
    assert "unparsed 2 in 02-compose Sure! Here you go no list in the answer" in text
    assert "timed out 2 in 02-compose" in text


def test_diversity_compares_as_many_rows(page):
    text = page.text("diversity")
    assert "seeds (30) accepted, as many (30) accepted, all (36)" in text
    assert "Vendi score" in text
    assert re.search(r"Reference covered – \d\.\d+ \d\.\d+ share of", text)  # the seeds would cover themselves
    assert "By teacher" not in text  # only one of them has 20 rows
    assert "By round" not in text


def test_diversity_is_told_by_teacher_and_round_over_equal_numbers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SMALLEST", 14)
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=facts())
    text = Page((tmp_path / "r.html").read_text()).text("diversity")
    accepted = run.accepted
    for by, column in (("Teacher", "teacher"), ("Round", "round")):
        sizes = dict(accepted[column].value_counts().sort(column).iter_rows())
        few = min(sizes.values())
        assert f"By {by.lower()} {few} accepted rows of each, as many as the smallest has. {by} Accepted Distinct words in 100" in text
        rows = [accepted.filter(pl.col(column) == name)["input"].to_list() for name in sizes]
        for (name, n), texts in zip(sizes.items(), rows, strict=True):
            cut = [texts[row] for row in hash_order(texts)[:few]]
            figures = diversity(cut, embed(cut), embed(run.of_fate("real")["input"].to_list()))
            shown = [
                f"{figures[figure]:.3f}" if figures[figure] < 10 else f"{figures[figure]:.1f}"
                for figure in report.TRACKED
                if figure in figures
            ]
            assert f" {name} {n} {' '.join(shown)}" in text


def test_the_same_run_gives_the_same_page(run, path, tmp_path):
    write_report(tmp_path / "again.html", run, embed, title="bank v1", facts=facts(), splits={run.accepted["id"][0]: "test"})
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_a_run_of_plain_texts_without_labels_clusters_or_rejects(tmp_path):
    def text(number, **provenance):
        where = Provenance.model_validate({"origin": "made", "generator": "02-compose", "round": 1, **provenance})
        return Sample(text=f"A note about {('rain', 'tax', 'chess', 'bread', 'sleep', 'trains')[number]}.", provenance=where)

    run = write_run(tmp_path / "run", [text(0, origin="real", round=0)], [text(n) for n in range(1, 6)], [], filters=["03-rules"])
    write_report(tmp_path / "r.html", run, embed, title="notes", facts=ReleaseFacts(recipe={}, embedder="x"))
    page = Page((tmp_path / "r.html").read_text())
    assert page.payload["label"] == {"names": [], "of": [-1] * 6}
    assert {attrs["id"] for tag, attrs in page.elements if tag == "section"} == {
        "funnel",
        "map",
        "balance",
        "diversity",
        "failures",
        "samples",
    }


def test_a_run_that_made_nothing(tmp_path):
    run = write_run(tmp_path / "run", seeds()[:3], [], [], status="stopped")
    write_report(tmp_path / "r.html", run, embed, title="none", facts=facts())
    page = Page((tmp_path / "r.html").read_text())
    assert "0 rows accepted of 0 made" in page.text("head")
    assert "This run was stopped." in page.text("head")
    assert len(page.payload["text"]) == 3


def test_unknown_prices_are_not_zero(run, tmp_path):
    unpriced = facts().model_copy(update={"teachers": tuple(t.model_copy(update={"micro_usd": None}) for t in facts().teachers)})
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=unpriced)
    page = Page((tmp_path / "r.html").read_text())
    assert "without small, big: price unknown" in page.text("head")
    assert page.text("cost").count("unknown –") == 2


def test_more_samples_than_are_drawn_are_said_and_the_real_ones_are_all_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DRAWN", 50)
    write_report(tmp_path / "r.html", run, embed, title="bank", facts=facts())
    page = Page((tmp_path / "r.html").read_text())
    assert f"50 samples of {run.samples.height};" in page.text("map")
    fates = page.payload["fate"]
    assert sum(fates["names"][code] in ("real", "holdout") for code in fates["of"]) == 40
    assert "36 rows accepted of 45 made" in page.text("head")


@pytest.mark.parametrize("letter", ["<", "語", "a"])
def test_the_payload_stays_in_its_bounds_whatever_the_texts(letter):
    where = Provenance(origin="made", generator="02-compose")
    frame = samples_frame(Sample(text=f"{n} " + letter * 3000, provenance=where) for n in range(report.DRAWN))
    nothing = [pl.lit(None, pl.String).alias(name) for name in ("fate", "by", "reason", "name", "split")]
    frame = frame.with_columns(*nothing, pl.lit(None, pl.Float64).alias("score"), shown="input")
    payload = report._payload(frame, np.zeros((frame.height, 2)))
    assert 500_000 < len(payload.encode()) <= report.PAYLOAD_BYTES
    assert "<" not in payload
    assert json.loads(payload)["text"][7].startswith("7 " + letter * 40)


def test_the_map_puts_like_texts_together():
    texts = [
        "Where is my money?",
        "Where has my money gone?",
        "The cat sleeps.",
        "A cat is sleeping.",
        "How warm is Oslo?",
        "Is it warm in Oslo?",
    ]
    texts += [f"{text} {word}" for text in texts for word in ("Thanks.", "Please.")]
    places = report._layout(embed(texts))
    assert places.shape == (18, 2)
    assert (places.min(), places.max()) == (0, 1)
    topic = np.array([n // 2 for n in range(6)] + [n // 4 for n in range(12)])
    far = np.linalg.norm(places[:, None] - places[None], axis=-1)
    alike = topic[:, None] == topic[None]
    assert far[alike].mean() < 0.6 * far[~alike].mean()
    assert np.array_equal(places, report._layout(embed(texts)))
    for few in range(5):
        assert report._layout(embed(texts)[:few]).shape == (few, 2)


def test_judges_are_told_with_what_they_leave_to_people(tmp_path, page):
    assert "judges" not in page.sections  # none was asked in that run
    real, new = seeds(), [chat(f"Where is transfer number {n}?", "transfer_timing") for n in range(6)]
    verdicts = [
        Verdict(sample=new[0].id, by="03-panel", keep=True, score=3.5, detail={"teacher": "small", "people": "judges disagree <b>"}),
        Verdict(sample=new[1].id, by="03-panel", keep=False, reason="score below 3", score=2, detail={"teacher": "big"}),
        Verdict(sample=new[2].id, by="03-panel", keep=False, reason="not judged", detail={"teacher": "big"}),
        *(Verdict(sample=sample.id, by="03-panel", keep=True, score=4, detail={"teacher": "small"}) for sample in new[3:]),
    ]
    run = write_run(tmp_path / "judged", real, new, verdicts, filters=("03-panel",))
    write_report(tmp_path / "judged.html", run, embed, title="bank", facts=facts())
    judged = Page((tmp_path / "judged.html").read_text())
    text = judged.text("judges")
    assert "03-panel kept 4 of 6, 1 not judged, mean score 3.50" in text
    assert "small: 4 judged" in text and "big: 1 judged" in text
    assert "For people to see first 1" in text
    assert "Where is transfer number 0?" in text and "judges disagree <b>" in text
