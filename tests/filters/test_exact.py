import polars as pl

from filters.exact import Exact
from tests.context import FakeContext, chat, frame


def _fates(stage: Exact, new: list[str], kept: list[str] = []) -> list[bool]:  # noqa: B006 - never changed
    """Whether each of `new` stays, in their order."""
    samples = [chat(text, str(n), round=n) for n, text in enumerate(new)]
    given = stage.judge(frame(*samples), FakeContext(kept=frame(*(chat(text) for text in kept))))
    keep = dict(zip(given["sample"], given["keep"], strict=True))
    return [keep[sample.id] for sample in samples]


def test_repeats_of_kept_and_of_new_rows_go_and_the_first_stays() -> None:
    assert _fates(Exact(), ["Where is my card?", "where is my card", "WHERE  is my card!", "Where is it?"], ["where is it"]) == [
        True,
        False,
        False,
        False,
    ]


def test_each_kind_of_difference_can_be_made_to_count() -> None:
    new = ["Where is it", "where is it", "Where is  it", "Where is it?", "Where is ｉt"]
    for number, kind in enumerate(("case", "whitespace", "punctuation", "unicode"), start=1):
        fates = _fates(Exact.model_validate({kind: False}), new)
        assert [place for place, kept in enumerate(fates) if kept] == [0, number], kind


def test_blank_texts_are_nobodys_twins() -> None:
    assert _fates(Exact(compare="output"), ["a"]) == [True]
    unanswered = frame(chat("one"), chat("two"))
    assert Exact(compare="output").judge(unanswered, FakeContext())["keep"].all()
    assert Exact(whitespace=False).judge(frame(chat(" ", "a"), chat(" ", "b")), FakeContext())["keep"].all()


def test_the_answer_counts_when_both_are_compared() -> None:
    new = frame(chat("yes or no?", "yes"), chat("yes or no?", "no"))
    assert Exact().judge(new, FakeContext())["keep"].sum() == 1
    assert Exact(compare="both").judge(new, FakeContext())["keep"].sum() == 2


def test_the_verdict_names_its_twin_and_reason() -> None:
    real, made = chat("Where is it?", origin="real"), chat("where is it")
    given = Exact().judge(frame(made, real), FakeContext())
    rejected = given.row(by_predicate=~pl.col("keep"), named=True)
    assert rejected["sample"] == made.id
    assert rejected["reason"] == "exact duplicate"
    assert rejected["detail"] == f'{{"twin":"{real.id}"}}'
    assert rejected["score"] is None


def test_no_rows() -> None:
    assert Exact().judge(frame(), FakeContext()).is_empty()
