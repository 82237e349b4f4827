"""Personal data, secrets and harm: what must fall or be masked, and what only looks like it, among it every real row there is."""

from __future__ import annotations

import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.masks import Span, mask
from factory.rows import read_samples
from factory.store import VERDICTS
from filters import personal
from filters.safety import Classifier, Safety, read_judgement
from schemas.call import Call
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame
from tests.small_models import made

ROOT = Path(__file__).parents[2]
REAL = ("examples/bank-intents/seeds.jsonl", "bench/data/banking77_dev.jsonl", "tests/data/gsm8k.jsonl", "tests/data/self_instruct.jsonl")
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nq83vEjRWeJA=\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"


def judged(*samples: Sample, ctx: FakeContext | None = None, **settings: Any) -> list[dict[str, Any]]:
    """The verdicts in the order of the samples, their detail read."""
    verdicts = Safety(**settings).judge(frame(*samples), ctx or FakeContext())
    assert verdicts.schema == VERDICTS
    rows = {row["sample"]: row | {"detail": json.loads(row["detail"])} for row in verdicts.iter_rows(named=True)}
    return [rows[sample.id] for sample in samples]


def texts(sample: Sample, verdict: dict[str, Any]) -> dict[str, str]:
    """What is masked, by kind."""
    return {
        kind: getattr(sample, part.split(".")[0])[int(part.split(".")[1])].content[start:end]
        for part, start, end, kind in verdict["detail"]["mask"]
    }


@pytest.mark.parametrize(
    ("kind", "secret", "around"),
    [
        ("CREDIT_CARD", "4111 1111 1111 1111", "My card {} was eaten."),
        ("CREDIT_CARD", "5500-0000-0000-0004", "Charge {}, please"),
        ("IBAN_CODE", "DE89 3704 0044 0532 0130 00", "Send it to {} today"),
        ("EMAIL_ADDRESS", "ada.lovelace@example.co.uk", "Write to {}."),
        ("PHONE_NUMBER", "+44 20 7946 0958", "Call {} now"),
        ("PHONE_NUMBER", "(415) 555-2671", "Call {} now"),
        ("IP_ADDRESS", "8.8.8.8", "The server {} is down"),
        ("CRYPTO", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "Pay to {}!"),
        ("US_SSN", "536-22-8726", "SSN: {}"),
        ("ES_NIF", "12345678Z", "Mi DNI es {}"),
        ("IT_FISCAL_CODE", "RSSMRA85T10A562S", "codice {}"),
        ("UK_NHS", "943 476 5919", "My NHS number is {}"),
        ("CA_SIN", "130 692 544", "social insurance number {}"),
    ],
)
def test_personal_data_is_masked_with_both_of_its_ends(kind: str, secret: str, around: str) -> None:
    sample = chat(around.format(secret), "thanks")
    (verdict,) = judged(sample)
    assert (verdict["keep"], verdict["reason"]) == (True, None)
    assert texts(sample, verdict) == {kind: secret}
    assert verdict["detail"]["found"] == {kind: 1}
    assert verdict["detail"]["did"] == {kind: "mask"}
    assert verdict["score"] >= verdict["detail"]["limit"] == 0.5
    assert mask(sample, [Span(*span) for span in verdict["detail"]["mask"]]).input == around.format(f"[{kind}]")


@pytest.mark.parametrize(
    "text",
    [
        "My card is 4111 1111 1111 1112",  # no Luhn number
        "Send it to DE88 3704 0044 0532 0130 00",
        "Order number 943 476 5919 is late",  # a valid NHS number, and nothing says that it is one
        "The router is at 192.168.0.1, and 127.0.0.1 is me",
        "Meet me @home at 10:30, gate B12",
        "user@localhost, or me@nothing.invalidtld",
        "She sold 48/2 = <<48/2=24>>24 clips and 1,234,567 more in 2024-11-29",
        "Wallet 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb",
        "SSN 000-12-3456",
        "version 1.2.3, build 20241129.4",
        "https://example.com/a:b/c@d",
        "eyJub3Q.a.token",
    ],
)
def test_what_only_looks_like_it_stays_as_it_is(text: str) -> None:
    (verdict,) = judged(chat(text, "ok"))
    assert (verdict["keep"], verdict["detail"]["found"]) == (True, {})
    assert "mask" not in verdict["detail"]


@pytest.mark.parametrize("path", REAL)
def test_no_real_row_is_a_false_alarm(path: str) -> None:
    rows = read_samples(ROOT / path)
    verdicts = Safety().judge(rows, FakeContext())
    assert verdicts["keep"].all()
    assert set(verdicts["detail"]) == {'{"limit": 0.5, "found": {}}'}


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("AWS_KEY", "AKIAIOSFODNN7EXAMPLE"),
        ("GITHUB_TOKEN", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
        ("SLACK_TOKEN", "xoxb-263594206564-2343594206574-FGqddMF8t08v8N7Oq4i57vs1"),
        ("STRIPE_KEY", "sk_" + "live_" + "51HG4cK2eZvKYlo2C0j3kFqXw9"),
        ("ANTHROPIC_KEY", "sk-ant-api03-abcdefghijklmnopqrstuv_0123456789-AA"),
        ("OPENAI_KEY", "sk-proj-abcdefghijklmnopqrstuv0123456789"),
        ("HUGGINGFACE_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz0123456789"),
        ("GOOGLE_KEY", "AIzaSyA1234567890abcdefghijklmnopqrstuv"),
        ("JWT_TOKEN", JWT),
        ("PRIVATE_KEY", KEY),
    ],
)
def test_a_secret_rejects_a_row_and_is_known_whole(kind: str, secret: str) -> None:
    sample = chat("How do I log in?", f"Use this: {secret} and wait.")
    (verdict,) = judged(sample)
    assert (verdict["keep"], verdict["reason"]) == (False, "secret")
    assert texts(sample, verdict) == {kind: secret}
    (kept,) = judged(sample, actions={"secret": "mask"})
    assert (kept["keep"], kept["detail"]["did"]) == (True, {kind: "mask"})
    assert judged(sample, secrets=False)[0]["detail"]["found"] == {}


def test_a_password_in_an_address_and_a_key_without_an_end() -> None:
    sample = chat("x", "https://bob:s3cr3t@mail.example.com/x")
    assert texts(sample, judged(sample)[0]) == {"BASIC_AUTH": "bob:s3cr3t"}  # and no e-mail address in it
    cut = chat("x", KEY[:60] + " — see?")
    assert texts(cut, judged(cut)[0])["PRIVATE_KEY"].startswith(KEY[:60])


def test_random_strings_are_secrets_on_request() -> None:
    sample = chat("x", 'token = "Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MHF3ZXJ0eXVpb3A"')
    assert judged(sample)[0]["detail"]["found"] == {}
    (verdict,) = judged(sample, entropy=True)
    assert (verdict["reason"], verdict["detail"]["found"]) == ("secret", {"HIGH_ENTROPY_STRING": 1})


def test_every_text_of_every_kind_of_sample_is_read() -> None:
    where = {"origin": "made", "generator": "t"}
    card = "4111 1111 1111 1111"
    turns = [{"role": role, "content": f"{card}!"} for role in ("system", "user", "assistant")]
    talk = Sample.model_validate({"messages": turns, "provenance": where})
    pair = Sample.model_validate(
        {"messages": turns[:2], "chosen": [turns[2]], "rejected": [turns[2] | {"content": card}], "provenance": where}
    )
    text = Sample.model_validate({"text": f"a {card}", "provenance": where})
    verdicts = judged(talk, pair, text)
    parts = [[span[0] for span in verdict["detail"]["mask"]] for verdict in verdicts]
    assert parts == [["messages.0", "messages.1", "messages.2"], ["messages.0", "messages.1", "chosen.0", "rejected.0"], ["text"]]
    assert verdicts[2]["detail"]["mask"] == [["text", 2, 21, "CREDIT_CARD"]]


def test_actions_decide_and_the_worse_reason_is_told_first() -> None:
    both = chat("4111 1111 1111 1111", "AKIAIOSFODNN7EXAMPLE")
    (strict,) = judged(both, actions={"personal": "reject"})
    assert strict["reason"] == "secret"
    (people,) = judged(both, actions={"personal": "people", "secret": "people"})
    assert people["keep"]
    assert people["detail"]["people"] == "safety: CREDIT_CARD, AWS_KEY"
    assert len(people["detail"]["mask"]) == 2  # what people have not seen is not released either
    (reject,) = judged(chat("4111 1111 1111 1111"), actions={"personal": "reject"})
    assert (reject["keep"], reject["reason"]) == (False, "personal data")


def test_the_threshold_and_the_list_of_entities() -> None:
    sample = chat("Call 415-555-2671, card 4111 1111 1111 1111")
    assert judged(sample, at_least=0.9)[0]["detail"]["found"] == {"CREDIT_CARD": 1}
    (only,) = judged(sample, entities=("PHONE_NUMBER",), at_least=0.9)
    assert (only["detail"]["found"], only["score"]) == ({}, 0.6)  # how close it was is told
    assert judged(sample, entities=())[0]["detail"]["found"] == {}


def test_a_hostile_row_has_a_verdict_in_bounded_time() -> None:
    rows = [
        chat("(" * 1_000_000),
        chat("\x00\u202e🙂 " + "1" * 100_000),
        chat("a.a." * 20_000 + "@"),
        chat("://a:" * 10_000 + "@"),
        chat('{"a":' * 20_000),
        chat("a@" * 20_000),
        chat("x " * 3_000 + "4111 1111 1111 1111" + " y" * 3_000),
    ]
    verdicts = judged(*rows)
    assert [verdict["keep"] for verdict in verdicts[:2]] == [True, True]
    assert verdicts[-1]["detail"]["mask"] == [["messages.0", 6000, 6019, "CREDIT_CARD"]]  # once, though pieces overlap


def test_seeds_that_hold_personal_data_are_reported_and_those_set_aside_too() -> None:
    real = chat("I am at ada@example.com", "ok", origin="real")
    held = chat("I am at bob@example.com", "ok", origin="real").model_copy(update={"holdout": True})
    ctx = FakeContext(seeds=frame(real, chat("nothing", origin="real")), holdout=frame(held))
    judged(chat("x"), ctx=ctx)
    assert ctx.reports["seeds"] == {"rows": 3, "with": 2, "found": {"EMAIL_ADDRESS": 2}, "ids": sorted([real.id, held.id])}


# -- names by a model ------------------------------------------------------------------------------------------------------


def test_names_are_found_by_a_spacy_model_that_the_recipe_names(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    made = spacy.blank("en")
    made.add_pipe("entity_ruler").add_patterns(
        [{"label": "PERSON", "pattern": "Ada Lovelace"}, {"label": "GPE", "pattern": "London"}, {"label": "ORG", "pattern": "Babbage Ltd"}]
    )
    made.to_disk(tmp_path / "model")
    sample = chat("Ada Lovelace of Babbage Ltd lives in London.", "ok")
    (verdict,) = judged(sample, names=str(tmp_path / "model"))
    assert texts(sample, verdict) == {"PERSON": "Ada Lovelace", "LOCATION": "London"}
    assert judged(sample, names=str(tmp_path / "model"), at_least=0.9)[0]["detail"]["found"] == {}
    with pytest.raises(GristmillError, match="'en_no_such_model' is not installed"):
        judged(sample, names="en_no_such_model")


# -- harm ------------------------------------------------------------------------------------------------------------------


def answers(text: str) -> FakeContext:
    return FakeContext(answers=lambda call: text, teachers=("big",))


def said(category: str, severity: int) -> str:
    return json.dumps({"evidence": "it says so", "category": category, "severity": severity})


@pytest.mark.parametrize(
    ("category", "severity", "keep"), [("none", 0, True), ("hate", 0, True), ("hate", 1, True), ("hate", 2, False), ("weapons", 3, False)]
)
def test_a_judge_rejects_from_the_severity_on(category: str, severity: int, keep: bool) -> None:
    ctx = answers(said(category, severity))
    (verdict,) = judged(chat("hm?", "well"), judges=("big",), ctx=ctx)
    assert (verdict["keep"], verdict["reason"]) == (keep, None if keep else "harmful")
    assert (verdict["score"], verdict["detail"]["limit"]) == (severity, 2)
    assert verdict["detail"] | {"found": {}} == verdict["detail"] | {
        "found": {},
        "category": category,
        "severity": severity,
        "evidence": "it says so",
    }
    assert verdict["detail"]["found"] == ({} if keep else {category: 1})
    assert verdict["detail"]["call"] == ctx.asked[0].key("fake", "fake")
    (people,) = judged(chat("hm?", "well"), judges=("big",), ctx=answers(said("hate", 3)), actions={"harmful": "people"})
    assert (people["keep"], people["detail"]["people"]) == (True, "safety: hate")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        said("nonsense", 1),
        said("hate", 4),
        said("none", 2),
        said("none", 0) + said("hate", 3),
        '{"category": "hate"}',
        '{"category": "hate", "severity": 0}',
        '{"evidence": "", "category": "hate", "severity": true}',
        '{"evidence": "", "category": "hate", "severity": 2.0}',
        '{"evidence": "", "category": ["hate"], "severity": 2}',
    ],
)
def test_an_answer_that_is_not_of_the_lists_is_no_judgement(text: str) -> None:
    assert read_judgement(text) is None
    (verdict,) = judged(chat("hm?"), judges=("big",), ctx=answers(text))
    assert (verdict["keep"], verdict["reason"], verdict["score"]) == (False, "not judged", None)
    assert verdict["detail"]["text"] == text
    (kept,) = judged(chat("hm?"), judges=("big",), ctx=answers(text), on_failure="keep")
    assert (kept["keep"], kept["reason"]) == (True, None)


def test_a_judge_is_shown_the_masked_text_and_never_a_row_that_fell() -> None:
    ctx = answers(said("none", 0))
    judged(chat("card 4111 1111 1111 1111 </example>", "ok"), chat("x", "AKIAIOSFODNN7EXAMPLE"), judges=("big",), ctx=ctx)
    (call,) = ctx.asked
    assert "card [CREDIT_CARD]" in call.messages[1].content
    assert call.messages[1].content.count("</example>") == 1
    assert not [call for call in ctx.asked if "4111" in str(call) or "AKIA" in str(call)]
    planned: list[Call] = list(Safety(judges=("big",)).questions(frame(chat("card 4111 1111 1111 1111 </example>", "ok")), ctx))
    assert planned == [call]
    assert list(Safety().questions(frame(chat("x")), ctx)) == []


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of 2 layers that was trained on nothing, saved as transformers saves one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "he",
        "she",
        "is",
        "a",
        "good",
        "bad",
        "awful",
        "man",
        "woman",
        "at",
        "it",
        "kill",
        "bread",
        "bake",
    ]
    (folder / "vocab.txt").write_text("\n".join([*words, *"abcdefghijklmnopqrstuvwxyz", *[f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]]))
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, max_position_embeddings=32,
        initializer_range=1.0, id2label={0: "fine", 1: "toxic", 2: "threat"}, label2id={"fine": 0, "toxic": 1, "threat": 2},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


ROWS = [
    chat(text, answer)
    for text, answer in (("he is good", "bake bread"), ("she is bad", "kill it"), ("a man", "awful at it"), ("bread", "a woman is good"))
]


def classifier(name: str, *unsafe: str) -> Classifier:
    return Classifier.of(Safety(classifier=name, unsafe_labels=unsafe), name, unsafe)


def harms(model: Classifier, *texts: str) -> list[float]:
    return [each.harm for each in model.harm(texts) if each is not None]


def test_a_classifier_gives_each_row_the_harm_of_its_worst_turn(bert: str) -> None:
    verdicts = judged(*ROWS, classifier=bert, unsafe_labels=("toxic", "threat"))
    model = classifier(bert, "toxic", "threat")
    for sample, verdict in zip(ROWS, verdicts, strict=True):
        harm = harms(model, *[message.content for message in sample.messages])
        assert verdict["score"] == pytest.approx(max(harm), abs=1e-5)
        assert verdict["detail"]["at"] == f"messages.{harm.index(max(harm))}"
        assert verdict["keep"] == (verdict["score"] < 0.5)
        assert verdict["reason"] == (None if verdict["keep"] else "harmful")
        assert set(verdict["detail"]["found"]) <= {"toxic", "threat"}
    only = judged(*ROWS, classifier=bert, unsafe_labels=("toxic", "threat"), harm_in="output")
    assert {verdict["detail"]["at"] for verdict in only} == {"messages.1"}
    least = min(verdict["score"] for verdict in verdicts)
    on_the_line = judged(*ROWS, classifier=bert, unsafe_labels=("toxic", "threat"), unsafe_at_least=least)
    assert [verdict["keep"] for verdict in on_the_line] == [False] * 4


def test_batches_and_long_texts_do_not_change_what_a_classifier_says(bert: str) -> None:
    model = classifier(bert, "toxic")
    many = ["he is good", "bread " * 200, "kill it", *["she is bad"] * 70]
    together = harms(model, *many)
    alone = [harms(model, text)[0] for text in many[:4]]
    assert together[:4] == pytest.approx(alone, abs=1e-5)
    (late,) = harms(model, "bread " * 100 + "kill kill kill awful")
    assert late >= harms(model, "bread " * 10)[0] - 1e-6  # the last window is read as well
    assert model.harm([]) == []


def test_bias_tells_whether_other_words_would_have_changed_the_decision(bert: str) -> None:
    rows = [chat("he is bad"), chat("bread")]
    model = classifier(bert, "toxic")
    he, she = (harms(model, text)[0] for text in ("he is bad", "she is bad"))
    assert he != pytest.approx(she)
    for limit, changed in (((he + she) / 2, True), (max(0.001, min(he, she) / 2), False)):
        first, second = judged(*rows, classifier=bert, unsafe_labels=("toxic",), unsafe_at_least=limit, bias=True)
        assert first["detail"]["bias"] == {"probability": round(she, 4), "changed": changed}
        assert "bias" not in second["detail"]  # it names nobody


def test_what_a_classifier_lacks_is_said(bert: str, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="no label 'toxi'; did you mean 'toxic'"):
        judged(ROWS[0], classifier=bert, unsafe_labels=("toxi",))
    with pytest.raises(GristmillError, match="can't open the model"):
        judged(ROWS[0], classifier=str(tmp_path / "none"), unsafe_labels=("toxic",))
    with pytest.raises(GristmillError, match="no trained weights"):
        judged(ROWS[0], classifier=made("classifier", labels=("fine", "toxic"), headless=True), unsafe_labels=("toxic",))


def test_a_classifier_is_never_fetched(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        tried.append(address)
        raise OSError("no network in tests")

    detect = pytest.importorskip("huggingface_hub.utils._detect_agent")
    monkeypatch.setattr(detect, "_registry", None)  # as it is in a process that has opened nothing yet
    monkeypatch.setattr(detect, "_read_cached_registry", lambda *_, **__: None)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(GristmillError, match="can't open the model"):
        judged(ROWS[0], classifier="nobody/no-such-classifier", unsafe_labels=("toxic",))
    assert tried == []


def test_batches_that_are_judged_at_once_open_a_classifier_once(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    kind, loads = transformers.AutoModelForSequenceClassification, []
    load = kind.from_pretrained

    def counted(*args: Any, **settings: Any) -> Any:
        loads.append(args)
        time.sleep(0.2)
        return load(*args, **settings)

    shutil.copytree(bert, tmp_path / "bert")
    monkeypatch.setattr(kind, "from_pretrained", counted)
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda _: judged(*ROWS, classifier=str(tmp_path / "bert"), unsafe_labels=("toxic",)), range(4)))
    assert len(loads) == 1
    assert scores == [scores[0]] * 4


def test_what_a_classifier_gives_no_number_for_is_not_judged(bert: str, tmp_path: Path) -> None:
    import torch
    import transformers

    shutil.copytree(bert, tmp_path / "bert")
    broken = transformers.BertForSequenceClassification.from_pretrained(bert)
    torch.nn.init.constant_(broken.classifier.bias, float("nan"))
    broken.save_pretrained(tmp_path / "bert")
    settings: dict[str, Any] = {"classifier": str(tmp_path / "bert"), "unsafe_labels": ("toxic",)}
    (verdict,) = judged(ROWS[0], **settings)
    assert (verdict["keep"], verdict["reason"], verdict["score"]) == (False, "not judged", None)
    assert verdict["detail"]["error"] == "the model gave no number"
    assert judged(ROWS[0], **settings, on_failure="keep")[0]["keep"]


# -- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entities": ["CREDIT_CART"]}, "did you mean 'CREDIT_CARD'"),
        ({"entities": ["PERSON"]}, "set `names:`"),
        ({"classifier": "x"}, "unsafe_labels"),
        ({"bias": True}, "bias is about a classifier"),
        ({"unsafe_labels": ["a"]}, "unsafe_labels is about a classifier"),
        ({"phone_regions": ["uk "]}, "ISO 3166"),
        ({"actions": {"harmful": "mask"}}, "harmful"),
    ],
)
def test_faulty_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Safety.model_validate(settings)


def test_what_is_left_out_by_default_is_in_the_docstring() -> None:
    assert all(entity in (Safety.__doc__ or "") for entity in personal.NOT_BY_DEFAULT)
    assert not set(personal.NOT_BY_DEFAULT) & set(personal.DEFAULT)
