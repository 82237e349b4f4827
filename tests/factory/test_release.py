import hashlib
import importlib.metadata
import itertools
import json
from collections import Counter

import numpy as np
import polars as pl
import pytest
import yaml

from factory.errors import ReleaseError, StoreError
from factory.records import RunFolder
from factory.release import LINEAGE, open_version, release
from factory.rows import read_samples
from factory.splits import NEAR
from schemas.manifest import SPLITS, Manifest
from schemas.recipe import ReleasePlan
from schemas.sample import Failure, Message, Provenance, Sample
from schemas.verdict import Verdict
from tests.context import embedder
from tests.run_on_disk import LINES, bank_run, chat, facts, made, seeds, write_run

PLAN = ReleasePlan(validation=0.1, test=0.2, licence="cc-by-4.0")


def embed(texts):
    return embedder().embed(texts)


def cut(run, datasets, *, name="bank", plan=PLAN, embed=embed, **options):
    return release(run, name=name, plan=plan, datasets=datasets, embed=embed, facts=facts(), **options)


def lines(version, split):
    return [json.loads(line) for line in (version / f"{split}.jsonl").read_text().splitlines()]


def everything(version):
    return [(split, row) for split in SPLITS for row in lines(version, split)]


def said(row):
    return row["messages"][0]["content"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return bank_run(tmp_path_factory.mktemp("runs") / "bank-00000000")


@pytest.fixture(scope="module")
def v1(run, tmp_path_factory):
    return cut(run, tmp_path_factory.mktemp("datasets"))


# -- what a version is -----------------------------------------------------------------------------------------------------


def test_a_version_holds_these_files_and_the_manifest_knows_each_byte(v1):
    assert v1.name == "v1"
    assert [path.name for path in v1.parent.iterdir()] == ["v1"]  # nothing of the making is left beside it
    tables = {"train.jsonl", "validation.jsonl", "test.jsonl", "lineage.parquet"}
    assert {path.name for path in v1.iterdir()} == {*tables, "README.md", "report.html", "manifest.json"}
    assert {oct(path.stat().st_mode)[-3:] for path in v1.iterdir()} == {"444"}
    manifest = open_version(v1)
    for name, known in manifest.files.items():
        data = (v1 / name).read_bytes()
        assert (known.sha256, known.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert manifest.files.keys() == {*tables, "README.md", "report.html"}
    assert {name: known.rows for name, known in manifest.files.items() if known.rows is not None} == {
        **{f"{split}.jsonl": len(lines(v1, split)) for split in SPLITS},
        "lineage.parquet": len(everything(v1)),
    }


def test_the_manifest_says_where_prices_come_from_and_one_without_it_is_still_read(v1, tmp_path):
    said = json.loads((v1 / "manifest.json").read_text())
    assert said["prices"] == f"genai-prices {importlib.metadata.version('genai-prices')}"
    older = Manifest.model_validate({key: value for key, value in said.items() if key != "prices"})
    assert older.prices is None


def test_all_that_was_accepted_and_no_rejected_row_is_in_it(run, v1):
    manifest = open_version(v1)
    assert {row["meta"]["id"] for _, row in everything(v1) if row["meta"]["origin"] == "made"} == set(run.accepted["id"])
    real = run.of_fate("real", "holdout").height
    assert manifest.counts.origin == {"made": run.accepted.height, "real": real - sum(manifest.left_out.values())}
    assert manifest.counts.total == len(everything(v1)) == sum(manifest.counts.split.values()) == sum(manifest.counts.label.values())
    assert manifest.counts.label == dict(Counter(row["meta"]["label"] for _, row in everything(v1)))
    assert manifest.counts.teacher == dict(sorted(run.accepted["teacher"].value_counts().iter_rows()))
    assert sum(manifest.counts.cluster.values()) == manifest.counts.total


def test_rows_are_chat_with_one_shape_and_ids_of_their_content(v1):
    for _, row in everything(v1):
        assert row.keys() == {"messages", "meta"}
        assert row["meta"].keys() == {"id", "label", "origin", "teacher", "generator", "round"}
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["meta"]["id"] == chat(said(row), row["messages"][1]["content"]).id
    order = [row["meta"]["label"] for row in lines(v1, "train")]
    assert sum(a == b for a, b in itertools.pairwise(order)) < len(order) / 3  # shuffled: labels do not stand in blocks


def test_datasets_reads_the_folder_as_its_card_says(v1, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    read = datasets.load_dataset(str(v1), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in read.items()} == open_version(v1).counts.split
    assert read["test"][0]["messages"][0]["role"] == "user"


def test_lineage_tells_where_every_row_came_from(run, v1):
    lineage = pl.read_parquet(v1 / "lineage.parquet")
    assert lineage.schema == LINEAGE
    assert dict(lineage.select("id", "split").iter_rows()) == {row["meta"]["id"]: split for split, row in everything(v1)}
    one = lineage.filter(pl.col("origin") == "made").row(0, named=True)
    sample = run.samples.row(by_predicate=pl.col("id") == one["id"], named=True)
    for column in ("parents", "generator", "teacher", "call", "round", "template", "axes", "label"):
        assert one[column] == sample[column]
    assert [score["by"] for score in one["scores"]] == ["04-near", "05-fits", "06-coverage"]
    assert one["cluster_name"]
    real = lineage.filter(pl.col("origin") == "real")
    assert real["source"].str.starts_with("seeds.jsonl:").all()
    assert real["parents"].list.len().max() == 0


def test_the_manifest_tells_how_it_was_made(run, v1):
    manifest = open_version(v1)
    assert [line.stage for line in manifest.funnel] == [row.stage for row in run.funnel()]
    assert manifest.funnel[3].rejected == {"near_duplicate": 2}
    assert manifest.micro_usd == run.status["micro_usd"]  # more than the stages', by what a probe had asked
    assert (manifest.teachers, manifest.seeds_licence, manifest.licence) == (facts().teachers, "CC BY 4.0", "cc-by-4.0")
    assert manifest.run.folder == "bank-00000000"
    assert {"python", "gristmill", "polars"} <= manifest.versions.keys()
    assert manifest.recipe == facts().recipe
    assert manifest.created.utcoffset().total_seconds() == 0
    assert manifest.notes == ()


def test_the_card_has_a_head_that_hubs_read_and_the_numbers(v1):
    manifest, text = open_version(v1), (v1 / "README.md").read_text()
    head, body = text.removeprefix("---\n").split("\n---\n", 1)
    card = yaml.safe_load(head)
    assert card["license"] == "cc-by-4.0"
    assert [file["path"] for file in card["configs"][0]["data_files"]] == ["train.jsonl", "validation.jsonl", "test.jsonl"]
    for split, rows in manifest.counts.split.items():
        assert f"| {split} | {rows} |" in body
    assert "2 near_duplicate" in body
    assert f"{manifest.leak_check.nearest:.3f}" in body


def test_what_is_not_known_is_said(run, tmp_path):
    unpriced = facts().model_copy(update={"teachers": tuple(t.model_copy(update={"micro_usd": None}) for t in facts().teachers)})
    plan = ReleasePlan(validation=0.001, test=0, licence="Ask us first")
    stopped = bank_run(tmp_path / "bank-1", status="short")
    version = release(stopped, name="bank", plan=plan, datasets=tmp_path, embed=embed, facts=unpriced)
    manifest = open_version(version)
    assert manifest.price_unknown == ("small", "big")
    assert [note.split()[0] for note in manifest.notes] == ["The", "validation", "The"]  # short of its target; empty; unknown price
    assert (version / "validation.jsonl").read_bytes() == b""
    card = yaml.safe_load((version / "README.md").read_text().split("---\n")[1])
    assert (card["license"], card["license_name"]) == ("other", "Ask us first")
    assert [file["split"] for file in card["configs"][0]["data_files"]] == ["train", "test"]


# -- splits ----------------------------------------------------------------------------------------------------------------


def test_no_row_has_a_near_duplicate_in_another_split(v1):
    rows = everything(v1)
    vectors, splits = embed([said(row) for _, row in rows]), np.array([split for split, _ in rows])
    cosines = (vectors @ vectors.T)[splits[:, None] != splits[None, :]]
    check = open_version(v1).leak_check
    assert cosines.max() < NEAR
    assert check.nearest == pytest.approx(float(cosines.max()), abs=1e-5)
    assert check.pairs == len(cosines) // 2


def test_holdouts_are_test_and_shown_seeds_are_train(run, v1):
    split_of = {row["meta"]["id"]: split for split, row in everything(v1)}
    assert {split_of[id_] for id_ in run.of_fate("holdout")["id"]} == {"test"}
    shown = [split_of.get(id_) for id_ in run.of_fate("real")["id"]]
    assert set(shown) <= {"train", None}
    assert shown.count(None) == sum(open_version(v1).left_out.values())


def test_a_made_row_near_a_holdout_goes_to_test_and_a_shown_seed_near_one_stays_out(tmp_path):
    real = seeds()
    held = next(seed for seed in real if seed.holdout)
    twin = chat(held.input.replace("?", " ?!"), held.label, origin="real", generator="01-seeds", round=0, teacher=None)
    near = chat(held.input.lower(), held.label)
    version = cut(write_run(tmp_path / "run", [*real, twin], [*made(real), near], []), tmp_path, plan=ReleasePlan(validation=0, test=0))
    split_of = {row["meta"]["id"]: split for split, row in everything(version)}
    assert split_of[near.id] == "test"
    assert twin.id not in split_of
    assert any("shown to a teacher and near a test row" in reason for reason in open_version(version).left_out)


@pytest.mark.parametrize("earlier", ["keep", "drop"])
def test_what_was_in_test_stays_there_and_draws_its_near_duplicates(tmp_path, earlier):
    real = seeds()
    first = cut(write_run(tmp_path / "one", real, made(real), []), tmp_path)
    before = {row["meta"]["id"]: (split, row) for split, row in everything(first)}
    tested = [row for split, row in before.values() if split == "test" and row["meta"]["origin"] == "made"]
    trained = next(row for split, row in before.values() if split == "train" and row["meta"]["origin"] == "made")
    gone = tested[0]  # the second run does not hold it, and makes something very near to it

    grown = {label: [text for text in texts if text != said(gone)] for label, texts in LINES.items()}
    again = [chat(said(gone) + " Please.", gone["meta"]["label"]), chat(said(trained) + " Please.", trained["meta"]["label"])]
    more = {label: [f"What does {label.replace('_', ' ')} mean, and who is {name}?" for name in ("Bo", "Ada")] for label in LINES}
    new = [*made(real, grown), *made(real, more), *again]
    second = cut(write_run(tmp_path / "two", real, new, []), tmp_path, plan=PLAN.model_copy(update={"earlier": earlier}))
    after = {row["meta"]["id"]: split for split, row in everything(second)}

    assert second.name == "v2"
    assert after.get(gone["meta"]["id"]) == {"keep": "test", "drop": None}[earlier]
    assert {after[row["meta"]["id"]] for row in tested[1:]} == {"test"}
    assert (after[again[0].id], after[again[1].id]) == ("test", "train")
    assert {id_: split for id_, (split, _) in before.items() if id_ in after} == {
        id_: split for id_, split in after.items() if id_ in before
    }
    manifest = open_version(second)
    assert manifest.previous == 1
    assert manifest.leak_check.earlier_test == open_version(first).counts.split["test"]


def test_a_seed_that_was_once_in_test_is_never_in_train_though_it_is_shown_now(tmp_path):
    real = seeds()
    cut(write_run(tmp_path / "one", real, made(real), []), tmp_path)
    shown_now = [seed.model_copy(update={"holdout": False}) for seed in real]
    second = cut(write_run(tmp_path / "two", shown_now, made(real), []), tmp_path)
    assert not {seed.id for seed in real if seed.holdout} & {row["meta"]["id"] for _, row in everything(second)}


# -- how much is real ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_real_rows_make_the_share_that_was_asked_for(run, tmp_path, share):
    version = cut(run, tmp_path, plan=ReleasePlan(real_share=share))
    manifest = open_version(version)
    assert manifest.real_share == pytest.approx(share, abs=0.5 / manifest.counts.total * 1.5)
    assert manifest.left_out["real, beyond the share asked for"] > 0
    shown = Counter(row["meta"]["label"] for row in lines(version, "train") if row["meta"]["origin"] == "real")
    assert max(shown.values()) - min(shown.values() if len(shown) == 10 else [0]) <= 2  # label by label


def test_a_share_out_of_reach_names_the_highest_one(run, tmp_path):
    with pytest.raises(ReleaseError, match=r"real_share 0\.9 of 36 made rows needs 324 real ones; there are") as refused:
        cut(run, tmp_path, plan=ReleasePlan(real_share=0.9))
    reachable = float(refused.value.next.split()[2])
    assert 0.4 < reachable < 0.53
    cut(run, tmp_path, plan=ReleasePlan(real_share=reachable))
    with pytest.raises(ReleaseError, match="real_share"):
        cut(run, tmp_path, plan=ReleasePlan(real_share=reachable + 0.02))


def test_holdouts_stay_in_test_though_no_real_row_is_wanted(run, tmp_path):
    version = cut(run, tmp_path, plan=ReleasePlan(real_share=0))
    real = {split: sum(row["meta"]["origin"] == "real" for row in lines(version, split)) for split in SPLITS}
    assert real == {"train": 0, "validation": 0, "test": 10}
    assert any("10 real rows of test" in note for note in open_version(version).notes)


# -- never changed, whole or absent ------------------------------------------------------------------------------------------


def test_the_same_rows_are_not_released_twice_unless_forced(run, tmp_path):
    first = cut(run, tmp_path)
    bytes_before = {path.name: path.read_bytes() for path in first.iterdir()}
    with pytest.raises(ReleaseError, match="v1 already holds exactly these rows"):
        cut(run, tmp_path)
    second = cut(run, tmp_path, force=True)
    assert second.name == "v2"
    assert {path.name: path.read_bytes() for path in first.iterdir()} == bytes_before
    assert all((first / f"{s}.jsonl").read_bytes() == (second / f"{s}.jsonl").read_bytes() for s in SPLITS)


def test_two_cuts_of_one_run_are_the_same_to_the_byte(run, v1, tmp_path):
    other = cut(run, tmp_path)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "lineage.parquet", "report.html"):
        assert (other / name).read_bytes() == (v1 / name).read_bytes()


@pytest.mark.parametrize("file", ["train.jsonl", "README.md"])
def test_a_version_that_was_changed_by_hand_is_refused(run, tmp_path, file):
    path = cut(run, tmp_path) / file
    path.chmod(0o644)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(StoreError, match=rf"never changes, and {file} did"):
        open_version(path.parent)
    with pytest.raises(StoreError, match="never changes"):
        cut(run, tmp_path, force=True)


@pytest.mark.parametrize(("manifest", "words"), [("{}", "not of the format"), ('{"format": "m1"}', "not whole"), ("{", "not whole JSON")])
def test_a_broken_or_foreign_manifest_is_named(tmp_path, manifest, words):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "manifest.json").write_text(manifest)
    with pytest.raises(StoreError, match=words):
        open_version(tmp_path / "v1")


def test_nothing_accepted_nothing_released(tmp_path):
    real = seeds()
    with pytest.raises(ReleaseError, match="no accepted rows"):
        cut(write_run(tmp_path / "run", real, [], []), tmp_path)
    assert not (tmp_path / "bank").exists()


def test_a_row_that_was_made_from_a_holdout_stops_the_release(tmp_path):
    real = seeds()
    held = next(seed for seed in real if seed.holdout)
    bad = chat("Is my cat allowed to open an account?", "failed_transfer", parents=(held.id,))
    with pytest.raises(ReleaseError, match=f"row {bad.id} was made from {held.id}, which is set aside for test"):
        cut(write_run(tmp_path / "run", real, [*made(real), bad], []), tmp_path)
    assert list((tmp_path / "bank").iterdir()) == []


def test_the_check_reads_the_files_and_does_not_trust_the_grouping(run, tmp_path):
    calls = []

    def fickle(texts):
        """Sees no likeness while rows are grouped, and the real one when the files are checked."""
        calls.append(len(texts))
        return np.eye(len(texts), dtype=np.float32) if len(calls) == 1 else embed(texts)

    real = seeds()
    twins = [
        chat(f"I would like to know how long {what} takes.", "transfer_timing") for what in ("it", "this", "that", "all this", "all that")
    ]
    run = write_run(tmp_path / "run", real, [*made(real), *twins], [])
    with pytest.raises(ReleaseError, match=r"share a near-duplicate \(cosine 0.9"):
        cut(run, tmp_path, embed=fickle, plan=ReleasePlan(validation=0.3, test=0.3))
    assert list((tmp_path / "bank").iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(run, tmp_path):
    calls = []

    def breaks(texts):
        calls.append(texts)
        if len(calls) == 6:  # after the check, while the report is made
            raise OSError("no more")
        return embed(texts)

    with pytest.raises(OSError, match="no more"):
        cut(run, tmp_path, embed=breaks)
    assert list((tmp_path / "bank").iterdir()) == []
    assert cut(run, tmp_path).name == "v1"


# -- other kinds -----------------------------------------------------------------------------------------------------------


TOPICS = ("rain", "tax", "chess", "bread", "sleep", "trains", "paint", "violins")


def of_kind(kind, number, **provenance):
    def turn(role, content):
        return Message(role=role, content=content)

    where = Provenance(origin="made", generator="02-compose", round=1).model_copy(update=provenance)
    topic = TOPICS[number]
    if kind == "text":
        return Sample(text=f"A note about {topic}.", provenance=where)
    asked, good, bad = (
        turn("user", f"Tell me of {topic}"),
        turn("assistant", f"All about {topic}"),
        turn("assistant", f"No idea of {topic}"),
    )
    if kind == "chat":
        return Sample(messages=(asked, good), provenance=where)
    return Sample(messages=(asked,), chosen=(good,), rejected=(bad,), provenance=where)


def test_preferences_and_texts_have_their_own_columns(tmp_path):
    columns = {"text": {"text", "meta"}, "preference": {"prompt", "chosen", "rejected", "meta"}}
    for kind, expected in columns.items():
        real = [of_kind(kind, n, origin="real", round=0) for n in (0, 1)]
        run = write_run(tmp_path / kind, real, [of_kind(kind, n) for n in range(2, 8)], [])
        version = cut(run, tmp_path, name=kind)
        rows = [row for _, row in everything(version)]
        assert len(rows) == 8
        assert {frozenset(row) for row in rows} == {frozenset(expected)}
        open_version(version)
    seed = of_kind("text", 0, origin="real", round=0)
    version = cut(write_run(tmp_path / "other", [seed], [of_kind("preference", n) for n in range(1, 5)], []), tmp_path, name="other")
    assert open_version(version).left_out == {"real, but not preference as the made rows are": 1}


def test_rows_of_several_kinds_stand_in_files_of_their_own_and_are_split_together(tmp_path):
    rows = [of_kind(kind, n) for kind in ("chat", "preference") for n in range(8)]
    version = cut(write_run(tmp_path / "mixed", [], rows, []), tmp_path, name="mixed", plan=PLAN.model_copy(update={"validation": 0.2}))
    manifest = open_version(version)
    names = {f"{kind}-{split}.jsonl" for kind in ("chat", "preference") for split in SPLITS}
    assert {path.name for path in version.glob("*.jsonl")} == names
    read = {name: [json.loads(line) for line in (version / name).read_text().splitlines()] for name in names}
    assert {frozenset(row) for name, of in read.items() for row in of if name.startswith("chat")} == {frozenset({"messages", "meta"})}
    pairs = [row for name, of in read.items() for row in of if name.startswith("preference")]
    assert {frozenset(row) for row in pairs} == {frozenset({"prompt", "chosen", "rejected", "meta"})}
    assert {row["meta"]["id"] for of in read.values() for row in of} == {row.id for row in rows}
    for split in SPLITS:  # a preference goes where the conversation of the same prompt goes
        asked = [{row["messages"][0]["content"] for row in read[f"chat-{split}.jsonl"]}]
        asked.append({row["prompt"][0]["content"] for row in read[f"preference-{split}.jsonl"]})
        assert asked[0] == asked[1] != set()
        assert manifest.counts.kind_by_split[split] == {"chat": len(asked[0]), "preference": len(asked[1])}
    assert manifest.counts.total == 16
    assert {name: manifest.files[name].rows for name in names} == {name: len(of) for name, of in read.items()}
    card = (version / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert [config["config_name"] for config in head["configs"]] == ["chat", "preference"]
    assert "`preference-train.jsonl` (" in card
    assert set(read_samples(version)["id"]) == {row.id for row in rows}  # for deduplication, diversity and decontamination


def test_datasets_reads_each_kind_as_the_card_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = [of_kind(kind, n) for kind in ("chat", "preference") for n in range(8)]
    version = cut(write_run(tmp_path / "mixed", [], rows, []), tmp_path, name="mixed")
    counts = open_version(version).counts.kind_by_split
    for kind, column in (("chat", "messages"), ("preference", "chosen")):
        loaded = datasets.load_dataset(str(version), kind, cache_dir=str(tmp_path / "cache"))
        assert {split: rows.num_rows for split, rows in loaded.items()} == {split: of[kind] for split, of in counts.items() if kind in of}
        assert loaded["train"][0][column][-1]["role"] == "assistant"


def test_of_one_prompt_there_may_be_several_preferences_and_none_stands_for_another(tmp_path):
    first = [of_kind("preference", n) for n in range(4)]
    other = (Message(role="assistant", content="Ask somebody else about such matters, please."),)
    second = [of_kind("preference", n).model_copy(update={"rejected": other}) for n in range(4)]
    cut(write_run(tmp_path / "one", [], first, []), tmp_path)
    v2 = cut(write_run(tmp_path / "two", [], second, []), tmp_path)
    assert open_version(v2).accumulated.left_out == {}
    assert open_version(v2).counts.total == 8
    louder = [(Message(role="assistant", content=row.rejected[0].content.upper()),) for row in first]
    third = [of_kind("preference", n).model_copy(update={"rejected": said}) for n, said in enumerate(louder)]
    v3 = cut(write_run(tmp_path / "three", [], third, []), tmp_path)
    split = dict(pl.read_parquet(v2 / "lineage.parquet").select("id", "split").iter_rows())
    gone = sum(split[row.id] != "test" for row in first)  # what was in test stays there
    assert gone and open_version(v3).accumulated.left_out == {"a new row is like it": gone}


def test_a_kind_that_comes_later_changes_the_names_of_the_files_and_no_row(tmp_path):
    chats, pairs = ([of_kind(kind, n) for n in range(8)] for kind in ("chat", "preference"))
    cut(write_run(tmp_path / "one", [], chats, []), tmp_path)
    v2 = cut(write_run(tmp_path / "two", [], pairs, []), tmp_path)
    manifest = open_version(v2)
    assert manifest.accumulated.rows == 8 and manifest.accumulated.left_out == {}
    v1, now = (pl.read_parquet(path / "lineage.parquet").sort("id") for path in (v2.with_name("v1"), v2))
    both = now.filter(pl.col("kind") == "chat")
    assert both["id"].equals(v1["id"]) and both["split"].equals(v1["split"])
    assert now.filter(pl.col("kind") == "preference").height == 8
    v3 = cut(write_run(tmp_path / "three", [], [*chats, *pairs], []), tmp_path, force=True)
    assert open_version(v3).counts.kind_by_split == manifest.counts.kind_by_split
    v4 = cut(write_run(tmp_path / "four", [], [of_kind("text", n) for n in range(8)], []), tmp_path)
    assert len(list(v4.glob("*.jsonl"))) == 9
    replaced = cut(write_run(tmp_path / "five", [], [*chats, *pairs], []), tmp_path, plan=PLAN.model_copy(update={"earlier": "drop"}))
    assert open_version(replaced).counts.total == 16  # its files are v4's, but for those of texts: it is another version


# -- what nobody is to read ------------------------------------------------------------------------------------------------

CARD = "4111 1111 1111 1111"
SAFE = "03-safety"


def found(sample, *, keep=True, action="mask", kind="CREDIT_CARD", part="messages.0", secret=CARD, by=SAFE, **detail):
    start = said_in(sample, part).index(secret)
    told = {"found": {kind: 1}, "did": {kind: action}, "mask": [[part, start, start + len(secret), kind]], **detail}
    return Verdict(sample=sample.id, by=by, keep=keep, reason=None if keep else "personal data", score=1.0, detail=told)


def said_in(sample, part):
    field, number = part.split(".")
    return getattr(sample, field)[int(number)].content


def looked(samples, by=SAFE):
    return [Verdict(sample=sample.id, by=by, keep=True, score=0.0, detail={"found": {}}) for sample in samples]


@pytest.fixture(scope="module")
def careless(tmp_path_factory):
    """A run whose safety stage stands behind the rules: one row is masked, one falls for its card, one fell before anybody looked."""
    real = seeds()
    good = made(real)
    kept = chat(f"Why was my card {CARD} declined at the baker's?", "declined_transfer", axes={"like": f"number {CARD}"})
    fell = chat(f"Please stop {CARD} at once, it was stolen from me.", "cancel_transfer")
    unseen = chat(f"ok {CARD}", "pending_transfer")
    verdicts = [
        *looked(good),
        found(kept),
        found(fell, keep=False, action="reject"),
        Verdict(sample=unseen.id, by="02-rules", keep=False, reason="too short", detail={"evidence": f"{CARD} is all of it"}),
        Verdict(sample=kept.id, by="04-near", keep=True, score=0.4, detail={"evidence": f"holds {CARD}", "twin": good[0].id}),
    ]
    failures = [Failure(reason="unparsed", detail=f"no list: {CARD}", text=f"Sure! {CARD}", teacher="small", call="c1" + "e" * 32)]
    folder = tmp_path_factory.mktemp("careless") / "bank-00000000"
    filters = ("02-rules", SAFE, "04-near", "06-coverage")
    return write_run(folder, real, [*good, kept, fell, unseen], verdicts, failures, filters=filters), kept


def every_word(version):
    """All that a version's files say, tables as text."""
    tables = {path.name: str(pl.read_parquet(path).to_dicts()) for path in version.glob("*.parquet")}
    return {path.name: tables.get(path.name) or path.read_text() for path in version.iterdir()}


def test_no_released_file_holds_what_was_to_be_masked(careless, tmp_path):
    run, kept = careless
    assert CARD in str(run.samples.to_dicts())
    quoting = facts(recipe={"name": "bank", "stages": [{"compose": {"examples": [f"my card is {CARD}"]}}]})
    version = release(run, name="bank", plan=PLAN, datasets=tmp_path, embed=embed, facts=quoting)
    said = every_word(version)
    assert {"manifest.json", "README.md", "report.html", "lineage.parquet", "train.jsonl"} <= said.keys()
    assert [name for name, text in said.items() if CARD in text] == []
    (row,) = [row for _, row in everything(version) if row["meta"]["id"] == kept.id]
    assert row["messages"][0]["content"] == "Why was my card [CREDIT_CARD] declined at the baker's?"
    assert "the run's folder keeps" in said["README.md"].replace("The", "the")
    assert "not shown" in said["report.html"]


def test_a_masked_row_keeps_its_id_and_the_manifest_says_who_masked_it(careless, tmp_path):
    run, kept = careless
    version = cut(run, tmp_path)
    manifest = open_version(version)
    assert (manifest.masked.rows, manifest.masked.by, manifest.masked.kinds) == (1, {SAFE: 1}, {"CREDIT_CARD": 1})
    lineage = pl.read_parquet(version / "lineage.parquet")
    assert lineage.schema == LINEAGE
    (masks,) = lineage.filter(pl.col("id") == kept.id)["masked"].to_list()
    assert masks == [{"by": SAFE, "kind": "CREDIT_CARD"}]
    assert lineage.filter(pl.col("masked").list.len() > 0)["axes"].to_list() == ['{"like": "number [CREDIT_CARD]"}']
    metas = [row["meta"] for _, row in everything(version)]
    assert len({frozenset(meta) for meta in metas}) == 1
    assert [meta["id"] for meta in metas if meta["masked"]] == [kept.id]
    for _, row in everything(version):
        content = chat(said(row), row["messages"][1]["content"]).id
        assert content == (row["meta"]["masked"] or row["meta"]["id"])
    with pytest.raises(ReleaseError, match="v1 already holds exactly these rows"):
        cut(run, tmp_path)


def test_rows_that_masks_make_alike_are_one_row_and_no_split_leaks(tmp_path):
    real = seeds()
    cards = ("4111 1111 1111 1111", "5500 0000 0000 0004", "3400 0000 0000 009", "6011 0000 0000 0004")
    twins = [chat(f"Is {card} still a good card?", "declined_transfer") for card in cards]
    verdicts = [found(twin, secret=card) for twin, card in zip(twins, cards, strict=True)]
    run = write_run(tmp_path / "run", real, [*made(real), *twins], [*looked(made(real)), *verdicts], filters=(SAFE, "06-coverage"))
    version = cut(run, tmp_path, plan=ReleasePlan(validation=0.3, test=0.3))
    manifest = open_version(version)
    assert manifest.left_out["the same as another row once both are masked"] == 3
    assert [row["meta"]["id"] for _, row in everything(version) if row["meta"]["masked"]] == [min(twin.id for twin in twins)]
    assert not [card for card in cards for text in every_word(version).values() if card in text]


def test_a_masked_test_row_is_the_same_row_in_the_next_version(careless, tmp_path):
    run, kept = careless
    first = cut(run, tmp_path, plan=ReleasePlan(validation=0, test=0.9))
    split_of = {row["meta"]["id"]: split for split, row in everything(first)}
    assert split_of[kept.id] == "test"
    second = cut(run, tmp_path, plan=ReleasePlan(validation=0, test=0.1, real_share=0))
    assert {row["meta"]["id"]: split for split, row in everything(second)}[kept.id] == "test"
    assert open_version(second).leak_check.earlier_test == open_version(first).counts.split["test"]


def test_a_masked_row_that_was_changed_by_hand_is_known(careless, tmp_path):
    run, _ = careless
    version = cut(run, tmp_path, plan=ReleasePlan(validation=0, test=0.9))
    path, manifest = version / "test.jsonl", version / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("[CREDIT_CARD] declined", "1234 declined"))
    known = json.loads(manifest.read_text())
    known["files"]["test.jsonl"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(known))
    with pytest.raises(StoreError, match="its content is"):
        cut(run, tmp_path, force=True)


def test_the_audit_counts_what_was_found_and_what_became_of_it(careless, tmp_path):
    run, _ = careless
    version = cut(run, tmp_path)
    safety, card = open_version(version).safety, (version / "README.md").read_text()
    assert (safety.stages, safety.judged, safety.unseen) == ((SAFE,), len(made(seeds())) + 2, 0)
    assert safety.kinds["CREDIT_CARD"].model_dump() == {"found": 2, "rejected": 1, "masked": 1, "people": 0}
    assert "| CREDIT_CARD | 2 | 1 | 1 | 0 |" in card
    assert "Warning: there is no safety example" in card
    assert safety.seeds is None


def test_seeds_that_hold_personal_data_and_rows_for_people_are_warned_of(tmp_path):
    real = seeds()
    asked = chat("How do I hide money from my wife?", "transfer_timing")
    declined = Sample(
        messages=(
            Message(role="user", content="Help me rob a bank"),
            Message(role="assistant", content="I'm sorry, but I can't help with that."),
        ),
        label="transfer_timing",
        provenance=asked.provenance,
    )
    telling = chat("This is about safety.", "transfer_timing", axes={"kind": "safety"})
    verdicts = [
        *looked([*made(real), telling]),
        Verdict(
            sample=asked.id,
            by=SAFE,
            keep=True,
            detail={
                "found": {"other_crime": 1},
                "did": {"other_crime": "people"},
                "people": "safety: other_crime",
                "bias": {"changed": True},
            },
        ),
        Verdict(
            sample=declined.id,
            by=SAFE,
            keep=True,
            detail={"found": {}, "category": "other_crime", "severity": 0, "bias": {"changed": False}},
        ),
    ]
    run = write_run(tmp_path / "run", real, [*made(real), asked, declined, telling], verdicts, filters=(SAFE, "06-coverage"))
    stage = run.path / "round-01" / SAFE / "stage.json"
    told = json.loads(stage.read_text()) | {"reports": {"seeds": {"rows": 40, "with": 2, "found": {"EMAIL_ADDRESS": 2}, "ids": []}}}
    stage.write_text(json.dumps(told))
    version = cut(RunFolder(run.path), tmp_path)
    safety, card = open_version(version).safety, (version / "README.md").read_text()
    assert (safety.waiting, safety.refusals, safety.safety_examples, safety.swapped, safety.changed) == (1, 1, 2, 2, 1)
    assert "Warning: 2 of 40 real rows hold what was looked for (2 EMAIL_ADDRESS)" in card
    assert "Warning: 1 row of this version was to be seen by people" in card
    assert "| other_crime | 1 | 0 | 0 | 1 |" in card
    assert "on 1 of 2 rows (50.0%)" in card
    assert "there is no safety example" not in card


def test_a_version_without_a_safety_stage_says_so_and_an_older_manifest_is_still_read(v1):
    manifest = open_version(v1)
    assert (manifest.safety.stages, manifest.masked.rows, manifest.safety.unseen) == ((), 0, manifest.counts.origin["made"])
    assert "No stage looked for personal data" in (v1 / "README.md").read_text()
    said = json.loads((v1 / "manifest.json").read_text())
    older = Manifest.model_validate({key: value for key, value in said.items() if key not in ("safety", "masked", "terms")})
    assert (older.safety.judged, older.terms) == (0, ())


def test_the_card_says_under_whose_terms_the_rows_stand(v1):
    small, big = open_version(v1).terms
    assert (small.family, small.terms, small.training) == ("smollm", "Apache-2.0", "yes")
    assert (big.family, big.training, big.note) == ("gpt", "conditions", "not for models that compete with OpenAI")
    assert (
        "| big | gpt | OpenAI Services Agreement | conditions: not for models that compete with OpenAI |" in (v1 / "README.md").read_text()
    )
