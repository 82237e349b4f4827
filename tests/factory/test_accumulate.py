import hashlib
import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from factory.errors import AlreadyReleased, ReleaseError
from factory.publish import release_run
from factory.recipe import load_recipe
from factory.records import RunFolder
from factory.release import LINEAGE, _depths, open_version, release
from schemas.manifest import SPLITS
from schemas.recipe import ReleasePlan
from schemas.sample import Sample
from schemas.verdict import Verdict
from tests.context import embedder
from tests.run_on_disk import FILTERS, LINES, chat, facts, made, seeds, write_run

PLAN = ReleasePlan(validation=0.2, test=0.2)
ONE = {label: texts[:2] for label, texts in list(LINES.items())[:4]}
TWO = {label: texts[2:] for label, texts in list(LINES.items())[:4]}
NEAR_TEST = "why do i have a failed transfer"  # to a row that is set aside: no version holds it
REAL = [seed for seed in seeds(2) if seed.label in ONE and seed.input != NEAR_TEST]


def cut(run, datasets, *, plan=PLAN, told=None, **options):
    return release(run, name="bank", plan=plan, datasets=datasets, embed=embedder().embed, facts=told or facts(), **options)


def lines(version):
    return {
        row["meta"]["id"]: (split, row)
        for split in SPLITS
        for row in map(json.loads, (version / f"{split}.jsonl").read_text().splitlines())
    }


def lineage(version):
    return pl.read_parquet(version / "lineage.parquet")


def of_split(version, split, origin="made"):
    return lineage(version).filter((pl.col("split") == split) & (pl.col("origin") == origin))["id"].to_list()


def again(sample, **provenance):
    return sample.model_copy(update={"provenance": sample.provenance.model_copy(update=provenance)})


@pytest.fixture(scope="module")
def one():
    """What the first run made."""
    return made(REAL, ONE)


@pytest.fixture(scope="module")
def two():
    return made(REAL, TWO)


@pytest.fixture(scope="module")
def first(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("first")
    return cut(write_run(folder / "one", REAL, one, []), folder)


@pytest.fixture
def v1(tmp_path, first):
    """The version of the first run, in a folder of this test."""
    return Path(shutil.copytree(first, tmp_path / "bank" / "v1"))


def test_a_version_holds_the_last_one_and_what_is_new(tmp_path, one, two, v1):
    run = write_run(tmp_path / "two", REAL, two, [])
    v2 = cut(run, tmp_path)
    before, after = lines(v1), lines(v2)
    assert after.keys() == {sample.id for sample in [*REAL, *one, *two]}
    assert {row: after[row] for row in before} == before  # the split and every word of the line
    for row, old in {row["id"]: row for row in lineage(v2).iter_rows(named=True)}.items():
        expected = next((row for row in lineage(v1).filter(pl.col("id") == row).iter_rows(named=True)), None)
        assert old["since"] == (2 if expected is None else 1)
        kept = {name: old[name] for name in old if name not in ("near_group", "cluster", "place", "cluster_name", "scores")}
        assert expected is None or kept == {name: expected[name] for name in kept}
    manifest, card = open_version(v2), (v2 / "README.md").read_text()
    taken = manifest.accumulated
    assert (taken.asked, taken.rows, taken.real, taken.left_out) == ("keep", len(one), 0, {})
    assert manifest.counts.since == {"v1": len(before), "v2": len(two)}
    assert manifest.counts.depth == {"0": len(REAL), "1": len(one) + len(two)}
    assert manifest.left_out == {}
    assert f"| rows | {len(before)} | {len(two)} |" in card
    assert f"{len(one)} rows were taken over from v1" in card
    with pytest.raises(AlreadyReleased, match="v2 already holds exactly these rows"):
        cut(run, tmp_path)


def test_rows_of_the_last_version_keep_the_clusters_and_scores_they_had(tmp_path, one, two, v1):
    v2 = cut(write_run(tmp_path / "two", REAL, two, []), tmp_path)
    columns = ["id", "cluster", "cluster_name", "scores"]
    old = [sample.id for sample in one]
    before, after = (lineage(version).filter(pl.col("id").is_in(old)).sort("id").select(columns) for version in (v1, v2))
    assert after.equals(before)
    assert after["scores"].list.len().min() == 3


def test_old_rows_count_where_splits_are_dealt_out(tmp_path, two, v1):
    v2 = cut(write_run(tmp_path / "two", REAL, two, []), tmp_path)
    counts = open_version(v2).counts
    assert counts.split["validation"] / counts.total == pytest.approx(0.2, abs=0.06)
    assert counts.split["test"] / counts.total == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("asked", ["recipe", "once"])
def test_earlier_rows_are_left_behind_where_that_is_asked(tmp_path, one, two, v1, asked):
    run = write_run(tmp_path / "two", REAL, two, [])
    v2 = cut(run, tmp_path, plan=PLAN.model_copy(update={"earlier": "drop"}))
    assert lines(v2).keys() == {sample.id for sample in [*REAL, *two]}
    manifest = open_version(v2)
    assert (manifest.accumulated.asked, manifest.accumulated.rows) == ("drop", 0)
    assert manifest.accumulated.left_out == {"earlier rows were not wanted": len(one)}
    assert "8 (earlier rows were not wanted)" in (v2 / "README.md").read_text()
    if asked == "once":  # the version after it takes over the last one, not the first; a row that comes back is not new
        back = one[0]
        v3 = cut(write_run(tmp_path / "three", REAL, [back], []), tmp_path)
        assert lines(v3).keys() == {sample.id for sample in [*REAL, *two, back]}
        assert open_version(v3).counts.since == {"v1": len(REAL) + 1, "v2": len(two)}


def test_a_cluster_keeps_its_place_though_the_next_run_numbers_it_otherwise(tmp_path, one, two, v1):
    other = chat("Do you sell umbrellas?", "a label before all others", origin="real", generator="01-seeds", round=0, teacher=None)
    v2 = cut(write_run(tmp_path / "two", [*REAL, other], [*two, one[0]], []), tmp_path)
    before, after = lineage(v1), lineage(v2)
    assert before["place"].equals(before["cluster"])
    place_of = dict(before.select("label", "place").drop_nulls().iter_rows())
    run_rows = after.filter(pl.col("id").is_in([sample.id for sample in [*REAL, *two, one[0]]]) & pl.col("cluster").is_not_null())
    assert dict(run_rows.select("label", "place").iter_rows()) == place_of
    assert (run_rows["cluster"] == run_rows["place"] + 1).all()
    assert after.filter(pl.col("id") == other.id).select("cluster", "place").row(0) == (0, max(place_of.values()) + 1)
    assert dict(after.select("label", "place").drop_nulls().iter_rows()) == place_of | {other.label: max(place_of.values()) + 1}


# -- what is not taken over ------------------------------------------------------------------------------------------------


def test_a_row_that_the_run_turned_down_is_left_behind_and_one_that_found_no_place_is_not(tmp_path, one, two, v1):
    bad, surplus = one[0], one[1]
    verdicts = [Verdict(sample=bad.id, by="05-fits", keep=False, reason="nearest_other_label", score=0.1)]
    run = write_run(tmp_path / "two", REAL, [*two, bad, surplus], verdicts, surplus=[surplus.id])
    v2 = cut(run, tmp_path)
    assert lines(v2).keys() == {sample.id for sample in [*REAL, *one[1:], *two]}
    assert open_version(v2).accumulated.left_out == {"turned down by this run": 1}
    with pytest.raises(AlreadyReleased):
        cut(run, tmp_path)


def twin(sample, of, reason="near duplicate", **detail):
    return Verdict(sample=sample.id, by="04-near", keep=False, reason=reason, score=0.9, detail={"twin": of, **detail})


def test_a_copy_is_turned_down_for_the_row_that_stands_in_its_place_and_for_no_other(tmp_path, one, two):
    before = {sample.id: sample for sample in [*one, *two]}
    v1 = cut(write_run(tmp_path / "one", REAL, [*before.values()], []), tmp_path, plan=ReleasePlan(validation=0.15, test=0.15))
    lost, gone, known, foreign = (before[row] for row in of_split(v1, "train")[:4])
    item, valid = (before[of_split(v1, split)[0]] for split in ("test", "validation"))
    two = [chat(text, "failed_transfer") for text in LINES["cancel_transfer"]]
    surplus = two[0]
    verdicts = [
        twin(lost, two[1].id),  # which goes into the version
        twin(gone, surplus.id),  # which does not
        twin(known, known.id, against="datasets/bank/v1"),  # it is there already
        twin(foreign, "s1" + "0" * 32, against="theirs.jsonl"),
        twin(item, two[1].id),  # a row of test
        Verdict(sample=valid.id, by="03-rules", keep=False, reason="evaluation item copied", detail={"set": "datasets/bank/v1"}),
    ]
    new = [*two, lost, gone, known, foreign, item, valid]
    v2 = cut(write_run(tmp_path / "two", REAL, new, verdicts, surplus=[surplus.id]), tmp_path)
    assert before.keys() - lines(v2).keys() == {lost.id, foreign.id}
    assert open_version(v2).accumulated.left_out == {"turned down by this run": 2}


def test_a_new_row_stands_for_an_old_one_like_it_and_no_row_of_test_is_lost(tmp_path, one, two, v1):
    trained, valid, tested = (next(s for s in one if s.id == of_split(v1, split)[0]) for split in ("train", "validation", "test"))
    like = [chat(old.input + " Please.", old.label) for old in (trained, valid, tested)]
    run = write_run(tmp_path / "two", REAL, [*two, *like], [])
    v2 = cut(run, tmp_path, plan=ReleasePlan(validation=0, test=0))
    rows = lines(v2)
    assert [old.id in rows for old in (trained, valid, tested)] == [False, False, True]
    assert [rows[new.id][0] for new in like] == ["train", "validation", "test"]  # where the old one stood
    assert open_version(v2).accumulated.left_out == {"a new row is like it": 2}
    with pytest.raises(AlreadyReleased):
        cut(run, tmp_path, plan=ReleasePlan(validation=0, test=0))


def test_rows_that_stood_together_are_not_held_against_each_other(tmp_path, one, two):
    pair = chat(one[0].input + " Please.", one[0].label)
    v1 = cut(write_run(tmp_path / "one", REAL, [*one, pair], []), tmp_path)
    assert {one[0].id, pair.id} <= lines(v1).keys()
    v2 = cut(write_run(tmp_path / "two", REAL, [*two, one[0]], []), tmp_path)
    assert pair.id in lines(v2)
    assert open_version(v2).accumulated.left_out == {}


def test_an_old_row_leaves_rather_than_change_its_split(tmp_path, one, two, v1):
    """A seed that is set aside now is near a row of train: that must not stand beside it, and was no test row either."""
    trained = next(sample for sample in one if sample.id == of_split(v1, "train")[0])
    held = chat(trained.input + " Please.", trained.label, origin="real", generator="01-seeds", round=0, teacher=None)
    v2 = cut(write_run(tmp_path / "two", [*REAL, held.model_copy(update={"holdout": True})], two, []), tmp_path)
    assert lines(v2)[held.id][0] == "test"
    assert trained.id not in lines(v2)
    assert open_version(v2).accumulated.left_out == {"a new row near it would move it to another split": 1}


def test_rows_whose_prompt_showed_what_is_set_aside_now_are_left_behind(tmp_path, one, two, v1):
    shown = next(seed for seed in REAL if not seed.holdout and any(seed.id in sample.provenance.parents for sample in one))
    now = [seed.model_copy(update={"holdout": True}) if seed is shown else seed for seed in REAL]
    fresh = [again(sample, parents=()) for sample in two]
    v2 = cut(write_run(tmp_path / "two", now, fresh, []), tmp_path)
    tainted = {sample.id for sample in one if shown.id in sample.provenance.parents}
    assert {sample.id for sample in one} - lines(v2).keys() == tainted
    assert open_version(v2).accumulated.left_out == {"made from a row that is set aside for test now": len(tainted)}


def test_rows_of_another_kind_stay(tmp_path, one, v1):
    texts = [Sample(text=f"A note about {topic}.", provenance=one[0].provenance) for topic in ("rain", "tax", "chess")]
    v2 = cut(write_run(tmp_path / "two", [], texts, []), tmp_path)
    now = pl.read_parquet(v2 / "lineage.parquet")
    assert set(now.filter(pl.col("kind") == "text")["id"]) == {text.id for text in texts}
    assert now.filter(pl.col("kind") == "chat").height == open_version(v2).accumulated.rows == len(one) + len(REAL)


# -- real rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["keep", "made"])
def test_real_rows_stay_though_they_are_no_longer_seeds_unless_made_ones_alone_are_wanted(tmp_path, one, two, v1, earlier):
    held, shown = (next(seed for seed in REAL if seed.holdout is holdout) for holdout in (True, False))
    fewer = [seed for seed in REAL if seed not in (held, shown)]
    plan = PLAN.model_copy(update={"earlier": earlier})
    v2 = cut(write_run(tmp_path / "two", fewer, two, []), tmp_path, plan=plan, told=facts(seeds_licence="MIT"))
    rows, manifest = lines(v2), open_version(v2)
    assert {sample.id for sample in one} <= rows.keys()
    if earlier == "keep":
        assert (rows[held.id][0], rows[shown.id][0]) == ("test", "train")
        assert manifest.accumulated.real == 2
        assert manifest.notes == ("Of v1's real rows, 2 are kept here; their licence there: CC BY 4.0.",)
        assert manifest.leak_check.holdouts == sum(seed.holdout for seed in REAL)
    else:
        assert not {held.id, shown.id} & rows.keys()
        assert manifest.accumulated.left_out == {"real, and no longer among the seeds": 2}
        assert manifest.notes == ()


def test_a_real_row_that_was_rewritten_is_replaced_even_in_test(tmp_path, two, v1):
    held = next(seed for seed in REAL if seed.holdout)
    mended = chat(held.input, "card_arrival", origin="real", generator="01-seeds", round=0, teacher=None)
    now = [seed for seed in REAL if seed is not held] + [mended.model_copy(update={"holdout": True})]
    v2 = cut(write_run(tmp_path / "two", now, two, []), tmp_path)
    assert lines(v2)[mended.id][0] == "test"
    assert held.id not in lines(v2)
    assert open_version(v2).accumulated.left_out == {"a new row is like it": 1}


def test_a_share_that_earlier_rows_put_out_of_reach_names_them(tmp_path, one, two, v1):
    run = write_run(tmp_path / "two", REAL, two, [])
    with pytest.raises(ReleaseError, match="real_share") as refused:
        cut(run, tmp_path, plan=PLAN.model_copy(update={"real_share": 0.6}))
    assert f"{len(one)} of the made rows are of earlier versions; --replace leaves them out" in refused.value.next


# -- masks, audits, terms --------------------------------------------------------------------------------------------------

CARD = "4111 1111 1111 1111"
SAFE = "03-safety"
CAREFUL = (SAFE, *FILTERS[1:])


def found(sample, card=CARD, **detail):
    start = sample.input.index(card)
    told = {"found": {"CREDIT_CARD": 1}, "mask": [["messages.0", start, start + len(card), "CREDIT_CARD"]], **detail}
    return Verdict(sample=sample.id, by=SAFE, keep=True, score=1.0, detail=told)


def looked(samples):
    return [Verdict(sample=sample.id, by=SAFE, keep=True, score=0.0, detail={"found": {}}) for sample in samples]


def test_what_was_masked_stays_masked_and_the_audit_remembers_it(tmp_path, one, two):
    secret = chat(f"Is {CARD} still a good card?", one[0].label)
    verdicts = [*looked(one), found(secret, people="see it")]
    v1 = cut(write_run(tmp_path / "one", REAL, [*one, secret], verdicts, filters=CAREFUL), tmp_path)
    v2 = cut(write_run(tmp_path / "two", REAL, two, looked(two), filters=CAREFUL), tmp_path)
    assert lines(v2)[secret.id][1]["messages"][0]["content"] == "Is [CREDIT_CARD] still a good card?"
    assert lines(v2)[secret.id][1]["meta"]["masked"] == lines(v1)[secret.id][1]["meta"]["masked"] != secret.id
    manifest = open_version(v2)
    assert (manifest.masked, manifest.masked.rows) == (open_version(v1).masked, 1)
    assert (manifest.safety.unseen, manifest.safety.waiting) == (0, 1)
    blind = cut(write_run(tmp_path / "three", REAL, made(REAL, {"failed_transfer": ("My cat ate the bank card.",)}), []), tmp_path)
    assert (open_version(blind).safety.unseen, open_version(blind).safety.waiting) == (1, 1)


def test_of_two_rows_that_masks_make_alike_the_one_in_test_stays(tmp_path, one, two):
    old, new = (chat(f"Is {card} still a good card?", one[0].label) for card in (CARD, CARD.replace("4", "5")))
    all_in_test = ReleasePlan(validation=0, test=0.99)
    v1 = cut(write_run(tmp_path / "one", REAL, [*one, old], [found(old)], filters=CAREFUL), tmp_path, plan=all_in_test)
    assert lines(v1)[old.id][0] == "test"
    v2 = cut(write_run(tmp_path / "two", REAL, [*two, new], [found(new, card=CARD.replace("4", "5"))], filters=CAREFUL), tmp_path)
    assert lines(v2)[old.id][0] == "test"
    assert new.id not in lines(v2)
    assert open_version(v2).left_out == {"the same as another row once both are masked": 1}


def test_a_row_that_was_released_as_it_stood_is_masked_where_the_run_says_so(tmp_path, one, two):
    secret = chat(f"Is {CARD} still a good card?", one[0].label)
    cut(write_run(tmp_path / "one", REAL, [*one, secret], []), tmp_path)
    run = write_run(tmp_path / "two", REAL, [*two, secret], [*looked(two), found(secret)], filters=CAREFUL, surplus=[secret.id])
    v2 = cut(run, tmp_path)
    assert lines(v2)[secret.id][1]["messages"][0]["content"] == "Is [CREDIT_CARD] still a good card?"
    assert lineage(v2).filter(pl.col("id") == secret.id)["masked"].to_list() == [[{"by": SAFE, "kind": "CREDIT_CARD"}]]
    assert open_version(v2).masked.rows == 1
    with pytest.raises(AlreadyReleased):
        cut(run, tmp_path)


def test_earlier_teachers_terms_stand_as_long_as_their_rows_do(tmp_path, two, v1):
    other = facts(teachers=[facts().teachers[0].model_copy(update={"model": "llama-3.1-8b", "licence": None})])
    run = write_run(tmp_path / "two", REAL, two, [])
    assert [(t.name, t.model) for t in open_version(cut(run, tmp_path, told=other)).terms] == [
        ("small", "llama-3.1-8b"),
        ("small", "smollm2-135m-instruct"),
        ("big", "gpt-4o-mini"),
    ]
    alone = cut(run, tmp_path, told=other, plan=PLAN.model_copy(update={"earlier": "drop"}))
    assert [t.model for t in open_version(alone).terms] == ["llama-3.1-8b"]


# -- generations -----------------------------------------------------------------------------------------------------------


def test_depths_of_earlier_versions_count_where_the_run_does_not_know_better():
    rows = pl.DataFrame(
        {
            "id": ["seed", "a", "b", "c", "d", "e", "f", "once made"],
            "origin": ["real", *["made"] * 6, "real"],
            "parents": [[], ["seed"], ["a", "seed"], ["b", "old"], [], ["once made", "nobody"], ["b"], []],
            "meta": ["{}"] * 8,
        }
    )
    known = pl.DataFrame({"id": ["old", "a", "once made", "seed"], "depth": [4, 9, 2, 0]})
    assert _depths(rows.sample(fraction=1, shuffle=True, seed=3), known) == {
        "seed": 0,
        "a": 1,
        "b": 2,
        "c": 5,
        "d": 1,
        "e": 3,
        "f": 3,
        "once made": 2,
        "old": 4,
    }


def test_depth_counts_parents_of_earlier_versions_and_of_the_run_that_are_not_released(tmp_path, one, two, v1):
    middle, end = again(two[0], parents=(one[0].id,)), again(two[1], parents=(two[0].id,), round=2)
    rejected = Verdict(sample=middle.id, by="05-fits", keep=False, reason="unsure", score=0.1)
    v2 = cut(write_run(tmp_path / "two", REAL, [*two[2:], middle, end], [rejected]), tmp_path)
    assert lineage(v2).filter(pl.col("id") == end.id)["depth"].item() == 3
    assert open_version(v2).counts.depth["3"] == 1
    assert "3 for 1" in (v2 / "README.md").read_text()


# -- versions of earlier Gristmills ------------------------------------------------------------------------------------------


def aged(version):
    """Take from a version what earlier Gristmills did not write."""
    path, sums = version / "lineage.parquet", version / "manifest.json"
    for file in (path, sums):
        file.chmod(0o644)
    lineage(version).drop("since", "depth", "place", "audit").write_parquet(path)
    told = {key: value for key, value in json.loads(sums.read_text()).items() if key not in ("accumulated", "alarms", "terms", "safety")}
    told["counts"] = {key: value for key, value in told["counts"].items() if key not in ("since", "depth")}
    told["files"]["lineage.parquet"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(json.dumps(told))


def test_a_version_without_the_new_columns_is_taken_over_as_well(tmp_path, one, two, v1):
    deep = again(one[1], parents=(one[0].id,))
    v2 = cut(write_run(tmp_path / "deep", REAL, [one[0], deep, *one[2:], two[0]], []), tmp_path)
    for version in (v1, v2):
        aged(version)
    v3 = cut(write_run(tmp_path / "two", REAL, two, []), tmp_path)
    after = lineage(v3)
    assert after.schema == LINEAGE
    assert set(after["id"]) == {sample.id for sample in [*REAL, *one, *two]}
    assert dict(after.group_by("since").len().iter_rows()) == {1: len(one) + len(REAL), 2: 1, 3: len(two) - 1}
    assert after.filter(pl.col("id") == deep.id)["depth"].item() == 2
    assert [t.name for t in open_version(v3).terms] == ["small", "big"]


# -- alarms ----------------------------------------------------------------------------------------------------------------

ALARM = {
    "round": 2,
    "value": 0.1,
    "threshold": 0.2,
    "teacher": None,
    "name": "repeats",
    "sentence": "A third of round 2 says what round 1 said.",
    "stops": True,
}


def alarmed(folder, new, **status):
    run = write_run(folder, REAL, new, [], status="alarm")
    told = json.loads((folder / "run.json").read_text()) | {"reason": ALARM["sentence"], "alarms": [ALARM], **status}
    (folder / "run.json").write_text(json.dumps(told))
    return RunFolder(run.path)


def test_a_run_that_an_alarm_ended_is_not_released_unless_that_is_said(tmp_path, one):
    run = alarmed(tmp_path / "one", one)
    with pytest.raises(ReleaseError, match="A third of round 2") as refused:
        cut(run, tmp_path)
    assert "--despite-alarm" in refused.value.next
    assert not (tmp_path / "bank").exists()
    version = cut(run, tmp_path, despite_alarm=True)
    manifest = open_version(version)
    assert manifest.notes == (f"An alarm ended the run, and it was released all the same: {ALARM['sentence']}",)
    assert manifest.alarms == (ALARM["sentence"],)
    assert f"> **Alarm:** {ALARM['sentence']}" in (version / "README.md").read_text()


def test_alarms_that_ended_nothing_are_told(tmp_path, one):
    version = cut(alarmed(tmp_path / "one", one, status="done", reason="the target is met"), tmp_path)
    assert (open_version(version).alarms, open_version(version).notes) == ((ALARM["sentence"],), ())


# -- a recipe's run --------------------------------------------------------------------------------------------------------


def test_a_changed_recipe_adds_to_what_the_first_one_made(tmp_path, one, two):
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"text": seed.input, "label": seed.label}) + "\n" for seed in REAL))
    home = tmp_path / "mill"

    def version_of(words, new, **options):
        path = Path(tmp_path / "recipe.yaml")
        path.write_text(
            f"name: bank\ntarget: {{accepted: 8}}\nteachers: {{small: {{kind: fake, model: f}}}}\n"
            f"stages: [{{seeds: {{path: seeds.jsonl}}}}, {{compose: {{teachers: [small]}}}}, {{rules: {{max_words: {words}}}}}]\n"
        )
        recipe = load_recipe(path)
        folder = recipe.run_folder(home)
        if not folder.exists():
            (alarmed if options.get("despite_alarm") else write_run)(folder, *([new] if options.get("despite_alarm") else [REAL, new, []]))
        return release_run(recipe, home, **options)

    version_of(50, one)
    with pytest.raises(AlreadyReleased):
        version_of(50, one)
    v2 = version_of(60, two, despite_alarm=True)
    assert lines(v2).keys() == {sample.id for sample in [*REAL, *one, *two]}
    v3 = version_of(60, two, replace=True, despite_alarm=True)
    assert lines(v3).keys() == {sample.id for sample in [*REAL, *two]}
    assert open_version(v3).accumulated.asked == "drop"
