import unicodedata

import numpy as np
import polars as pl
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.words import flat, words


def reference(text: str) -> list[str]:
    """The words of a text by another implementation of UAX #29."""
    pieces = regex.split(r"\b", unicodedata.normalize("NFKC", text), flags=regex.V1 | regex.WORD)
    return [piece.lower() for piece in pieces if regex.search(r"[\p{L}\p{N}_]", piece)]


def split(texts: list[str]) -> list[list[int]]:
    hashes, offsets = words(flat(texts))
    return [hashes[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]


def same(texts: list[str]) -> bool:
    """Whether words are equal here just where they are equal by the reference."""
    ours = [word for text in split(texts) for word in text]
    theirs = [word for text in texts for word in reference(text)]
    return len(ours) == len(theirs) and len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs))


@pytest.mark.parametrize(
    "text",
    [
        "I can't find 3.5 of the 1,000 cards: they're LOST, aren’t they?",
        "naïve café, naïve café; Straße straße",
        "你好世界。今天天气很好",
        "ひらがなとカタカナ 漢字",
        "Привет, мир! Γειά σου κόσμε",
        "C# f(x) a.b 10:30 e-mail snake_case",
        "'quoted' -- 'and' ... e.g. U.S.A.",
        "안녕하세요 세계",
        "مرحبا بالعالم 123",
        "",
        "   \n\t",
        "!!!",
    ],
)
def test_words_are_those_of_unicode(text: str) -> None:
    assert same([text])


def test_scripts_without_spaces_are_cut_by_letters() -> None:
    assert [len(text) for text in split(["สวัสดี", "ສະບາຍດີ", "𠀀𠀁"])][2] == 2
    assert len(split(["กขค"])[0]) == 3


@given(st.lists(st.text(alphabet="aB1é'’.,:; -_你かナ中\n", max_size=30), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_mixture_is_split_as_by_the_reference(texts: list[str]) -> None:
    assert same(texts)


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_it(texts: list[str]) -> None:
    hashes, offsets = words(flat(pl.Series(texts, dtype=pl.String)))
    assert offsets[0] == 0 and len(offsets) == len(texts) + 1
    assert (np.diff(offsets) >= 0).all() and len(hashes) == offsets[-1]


def test_case_and_form_do_not_matter() -> None:
    one, other, third = split(["CAFÉ Can’t", "cafe\N{COMBINING ACUTE ACCENT} can't", "ＣＡＦÉ can't"])
    assert one == other == third


def test_nothing_counts_as_empty() -> None:
    _, offsets = words(flat(pl.Series(["a", None, "b"])))
    assert offsets.tolist() == [0, 1, 1, 2]


@given(
    st.lists(
        st.text(alphabet=st.one_of(st.sampled_from("ae\u0301ｱｶﾞ가\u1100\u1161\u11a8ﬁ²"), st.characters(codec="utf-8")), max_size=20),
        max_size=5,
    )
)
@settings(max_examples=300, deadline=None)
def test_what_is_compared_is_in_nfkc(texts: list[str]) -> None:
    found = flat(texts)
    parts = [bytes(found.data[found.offsets[i] : found.offsets[i + 1]]).decode() for i in range(len(texts))]
    assert parts == [unicodedata.normalize("NFKC", text) for text in texts]
