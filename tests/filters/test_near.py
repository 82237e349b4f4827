import json

import polars as pl

from filters.near import Near
from tests.context import FakeContext, chat, frame
from tests.factory.test_jaccard import brute, mutated, seed_texts


def test_blank_texts_are_nobodys_twins() -> None:
    assert Near(compare="output").judge(frame(chat("one"), chat("two")), FakeContext())["keep"].all()


def test_a_typo_goes_and_a_question_of_its_own_stays() -> None:
    kept = chat("Why was my transfer to a friend declined yesterday?", origin="real")
    typo, copy, own = (
        chat(text, str(n)) for n, text in enumerate(("Why was my transfer to a freind declined yesterday", kept.input, "Where is my card?"))
    )
    given = Near().judge(frame(own, copy, typo), FakeContext(kept=frame(kept)))
    by_id = {row["sample"]: row for row in given.iter_rows(named=True)}
    assert [by_id[one.id]["keep"] for one in (typo, copy, own)] == [False, False, True]
    assert [by_id[one.id]["score"] for one in (copy, own)] == [1.0, None]
    assert 0.8 <= by_id[typo.id]["score"] < 1
    assert json.loads(by_id[typo.id]["detail"]) == json.loads(by_id[copy.id]["detail"]) == {"twin": kept.id}
    assert by_id[typo.id]["reason"] == "near duplicate"


def test_real_questions_are_no_near_duplicates_of_each_other() -> None:
    given = Near().judge(frame(*(chat(text) for text in seed_texts())), FakeContext())
    assert given["keep"].all()
    assert len(given) == 40


def test_a_higher_threshold_can_be_read_off_the_scores() -> None:
    new = frame(*(chat(text) for text in mutated(seed_texts(), 4)))
    given = Near(threshold=0.8).judge(new, FakeContext())
    assert given.filter(~pl.col("keep"))["score"].min() >= 0.8  # type: ignore[operator]
    assert given.filter("keep")["score"].max() < 0.8  # type: ignore[operator]
    assert given.filter("keep")["score"].count() > 0


def test_the_verdicts_do_not_depend_on_the_order_of_the_rows() -> None:
    texts = mutated(seed_texts()[:12], 8)
    kept, new = frame(*(chat(text) for text in texts[::7])), frame(*(chat(text) for n, text in enumerate(texts) if n % 7))
    copies = frame(*(chat(text.upper(), "copy") for text in texts[::3]))
    new = new.vstack(copies)
    first = Near().judge(new, FakeContext(kept=kept)).sort("sample")
    assert 0 < first["keep"].sum() < len(first)
    for seed in range(3):
        again = Near().judge(
            new.sample(fraction=1, shuffle=True, seed=seed), FakeContext(kept=kept.sample(fraction=1, shuffle=True, seed=seed))
        )
        assert again.sort("sample").equals(first)


def test_no_rejected_row_is_alone_and_no_two_that_stay_are_twins() -> None:
    texts = mutated(seed_texts()[:12], 8)
    rows = [chat(text) for text in texts]
    given = Near(recall=0.999).judge(frame(*rows), FakeContext())
    stay = set(given.filter("keep")["sample"])
    twins = [json.loads(detail)["twin"] for detail in given.filter(~pl.col("keep"))["detail"]]
    assert set(twins) <= stay
    assert not brute([one.input for one in rows if one.id in stay], 0.8, "chars", 3)


def test_no_rows() -> None:
    assert Near().judge(frame(), FakeContext()).is_empty()
    assert Near().judge(frame(), FakeContext(kept=frame(chat("a")))).is_empty()
