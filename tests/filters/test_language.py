from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from filters.language import codes, languages

ROOT = Path(__file__).parents[2]
WANTED = ("en", "de")
TEXTS = [
    "",
    "x",
    "?!",
    "why my transfer",
    "Ich habe gestern Geld überwiesen, es ist noch nicht angekommen.",
    "Pourquoi mon virement a-t-il été refusé ? Voilà déjà trois jours que j’attends.",
    "¿Por qué fue rechazada mi transferencia de ayer por la tarde?",
    "Perché il mio bonifico non è ancora arrivato sul conto di mia madre?",
    "Waarom is mijn overschrijving nog niet aangekomen bij de huisbaas?",
    "Почему мой перевод до сих пор не пришёл? Я жду уже три дня.",
    "我昨天转账了，但是还没到。我想取消这笔付款。",
    "昨日送金しましたが、まだ届いていません。キャンセルできますか。",
    "لماذا لم تصل حوالتي حتى الآن؟ لقد أرسلتها يوم الاثنين.",
    "WHY IS MY TRANSFER NOT THERE YET",
    "ÜBERWEISUNG AN MÜLLER FEHLT",
    "cafe\u0301 au lait, s'il vous plai\u0302t",  # not in NFC
    "ǅ is a letter of its own CASE",
    "the " * 5000,
]


def own(texts: list[str]) -> list[tuple[str, float, float]]:
    """What py3langid itself says: the likeliest, its probability, and that of the wanted ones."""
    ranked = [identifier().rank(text) for text in texts]
    return [(*row[0], sum(p for code, p in row if code in WANTED)) for row in ranked]


def identifier(found: list[Any] = []) -> Any:  # noqa: B006
    if not found:
        found.append(LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))
    return found[0]


def assert_equal(texts: list[str], *, within: float = 5e-6) -> None:
    for text, (code, probability, wanted), (language, *found) in zip(
        texts, own(texts), languages(pl.Series(texts, dtype=pl.String), WANTED).iter_rows(), strict=True
    ):
        assert found == pytest.approx([probability, wanted], abs=within), text[:80]
        assert language == code or probability < 0.6, text[:80]  # of two that are as likely either comes first


def rows(path: str) -> list[str]:
    turns = [json.loads(line)["messages"] for line in (ROOT / path).read_text().splitlines()]
    return [turn["content"] for messages in turns for turn in messages]


def test_real_texts_are_told_as_by_py3langid_itself() -> None:
    assert_equal(TEXTS)
    assert_equal(rows("examples/bank-intents/seeds.jsonl"))
    assert_equal(rows("bench/data/banking77_dev.jsonl")[:120])


def test_long_texts_are_told_as_well_as_32_bit_sums_allow() -> None:
    long = rows("tests/data/gsm8k.jsonl") + rows("tests/data/self_instruct.jsonl")
    assert_equal(long, within=2e-5)
    assert_equal([" ".join(long), " ".join(TEXTS[3:14])], within=2e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=12))
def test_any_texts_are_told_as_by_py3langid_itself(texts: list[str]) -> None:
    assert_equal(texts)


def test_a_batch_changes_nothing() -> None:
    texts = pl.Series(TEXTS * 40)
    whole = languages(texts, WANTED)
    assert whole.equals(pl.concat([languages(texts[i : i + 7], WANTED) for i in range(0, len(texts), 7)]))
    assert languages(texts.clear(), WANTED).schema == whole.schema


def test_languages_of_a_batch_are_those_of_its_texts() -> None:
    assert languages(pl.Series(TEXTS))["language"].to_list()[4:13] == ["de", "fr", "es", "it", "nl", "ru", "zh", "ja", "ar"]
    assert {"en", "de", "zh", "sr"} <= codes()
