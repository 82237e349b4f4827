"""Spans that are to be masked, in every kind of sample, and a run as people outside may see it."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.errors import ReleaseError
from factory.masks import Span, mask, masked, spans_in, texts_of
from factory.store import samples_frame, verdicts_frame
from schemas.sample import Sample
from schemas.verdict import Verdict

WHERE = {"origin": "made", "generator": "t"}


def sample(**fields: Any) -> Sample:
    return Sample.model_validate({"provenance": WHERE, **fields})


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = sample(
    messages=[
        turn("system", "be kind"),
        turn("user", "I am Ada 🙂 Lovelace"),
        turn("assistant", "hello Ada"),
        turn("user", "bye"),
        turn("assistant", "bye Ada"),
    ]
)
PAIR = sample(messages=[turn("user", "who?")], chosen=[turn("assistant", "Ada")], rejected=[turn("assistant", "Bob or Ada")])
TEXT = sample(text="Ada was here.")


def test_every_text_of_a_sample_has_a_name() -> None:
    rows = texts_of(samples_frame([TALK, PAIR, TEXT]))
    assert dict(rows.filter(pl.col("id") == PAIR.id).select("part", "text").iter_rows()) == {
        "messages.0": "who?",
        "chosen.0": "Ada",
        "rejected.0": "Bob or Ada",
    }
    assert rows.filter(pl.col("id") == TALK.id)["role"].to_list() == ["system", "user", "assistant", "user", "assistant"]
    assert rows.filter(pl.col("id") == TEXT.id).row(0) == (TEXT.id, "text", "text", "Ada was here.")
    assert texts_of(samples_frame([])).height == 0


@pytest.mark.parametrize(
    ("of", "span", "field", "expected"),
    [
        (TALK, ("messages.1", 5, 19), "messages", "I am [X]"),
        (TALK, ("messages.1", 9, 10), "messages", "I am Ada [X] Lovelace"),  # characters, not bytes
        (TALK, ("output", 4, 7), "messages", "bye [X]"),
        (PAIR, ("input", 0, 3), "messages", "[X]?"),
        (PAIR, ("output", 0, 3), "chosen", "[X]"),
        (PAIR, ("rejected.0", 7, 10), "rejected", "Bob or [X]"),
        (TEXT, ("text", 0, 3), "text", "[X] was here."),
        (TEXT, ("input", 0, 3), "text", "[X] was here."),
    ],
)
def test_a_span_is_masked_where_it_says(of: Sample, span: tuple[str, int, int], field: str, expected: str) -> None:
    new = mask(of, [Span(*span, "X")])
    changed = (
        new.text if field == "text" else next(a.content for a, b in zip(getattr(new, field), getattr(of, field), strict=True) if a != b)
    )
    assert changed == expected


def test_the_input_of_several_turns_is_masked_turn_by_turn() -> None:
    at = TALK.input.index("Lovelace")
    new = mask(TALK, [Span("input", at, TALK.input.index("hello Ada") + 9, "X")])  # over the end of a turn, and the role of the next
    assert [m.content for m in new.messages] == ["be kind", "I am Ada 🙂 [X]", "[X]", "bye", "bye Ada"]


def test_spans_that_overlap_become_one_of_the_longest_kind() -> None:
    new = mask(TEXT, [Span("text", 0, 3, "NAME"), Span("text", 2, 12, "LONG"), Span("input", 4, 7, "IN"), Span("text", 12, 13, "DOT")])
    assert new.text == "[LONG][DOT]"


@pytest.mark.parametrize(
    "span", [("text", 0, 99), ("text", 5, 5), ("text", -1, 3), ("messages.0", 0, 1), ("nowhere", 0, 1), ("messages.x", 0, 1)]
)
def test_a_span_that_is_nowhere_stops_the_release(span: tuple[str, int, int]) -> None:
    with pytest.raises(ReleaseError, match="no such place"):
        mask(TEXT, [Span(*span, "X")])


@given(st.text(min_size=1, max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), min_size=1, max_size=6))
def test_what_is_masked_is_gone_and_the_rest_is_as_it_was(text: str, places: list[tuple[int, int]]) -> None:
    spans = [Span("text", start, min(len(text), start + length), "K") for start, length in places if start < len(text)]
    hidden = {at for span in spans for at in range(span.start, span.end)}
    new = mask(sample(text=text), spans).text or ""
    left = "".join(character for at, character in enumerate(text) if at not in hidden)
    assert new.replace("[K]", "") == left or "[K]" in text


def test_a_frame_keeps_its_order_and_its_ids_and_label_meta_and_axes_are_masked_too() -> None:
    secret = sample(
        messages=[turn("user", "x"), turn("assistant", 'key "4111"11')],
        label='key "4111"11',
        meta={"raw": 'the key "4111"11.'},
        provenance={**WHERE, "axes": {"like": 'key "4111"11'}},
    )
    rows = samples_frame([TEXT, secret, TALK])
    new = masked(rows, {secret.id: [Span("output", 0, 12, "KEY")]})
    assert new["id"].to_list() == rows["id"].to_list()
    assert new.schema == rows.schema
    assert new.row(1, named=True)["output"] == new["label"][1] == "[KEY]"
    assert (new["meta"][1], new["axes"][1]) == ('{"raw": "the [KEY]."}', '{"like": "[KEY]"}')
    assert new[[0, 2]].equals(rows[[0, 2]])
    assert masked(rows, {}).equals(rows)


def test_the_last_verdict_of_each_filter_counts() -> None:
    def verdict(by: str, **detail: Any) -> Verdict:
        return Verdict(sample="s", by=by, keep=True, detail=detail)

    span = ["text", 0, 3, "A"]
    told = verdicts_frame(
        [verdict("1", mask=[span]), verdict("2", mask=[span]), verdict("1", found={}), verdict("3", evidence='"mask": no')]
    )
    assert spans_in(told) == {"s": {"2": [Span("text", 0, 3, "A")]}}
    with pytest.raises(ReleaseError, match="can't be read"):
        spans_in(verdicts_frame([verdict("1", mask=[["text", 0]])]))


def test_the_same_value_elsewhere_in_the_row_is_masked_too() -> None:
    of = sample(messages=[turn("user", "my NHS number is 943 476 5919"), turn("assistant", "I wrote down 943 476 5919.")])
    hidden = mask(of, [Span("messages.0", 17, 29, "UK_NHS")])
    assert [turn.content for turn in hidden.messages] == ["my NHS number is [UK_NHS]", "I wrote down [UK_NHS]."]


def test_what_holds_another_secret_is_replaced_whole() -> None:
    text = "a@b.example, https://x.example/?m=a@b.example&k=77"
    of = sample(text=text, meta={"link": "https://x.example/?m=a@b.example&k=77"})
    hidden = mask(of, [Span("text", 0, 11, "EMAIL"), Span("text", 13, len(text), "URL")])
    assert hidden.text == "[EMAIL], [URL]"
    assert hidden.meta == {"link": "[URL]"}
