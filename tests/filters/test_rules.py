from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from pydantic import ValidationError

from factory.recipe import load_recipe
from factory.store import VERDICTS, samples_frame
from filters import rules
from filters.rules import NAMES, Rules
from generators.seeds import read_rows
from schemas.sample import Failure, Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

DATA = Path(__file__).parents[1] / "data"
BANK = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"
MINILM = Path(__file__).parents[2] / "factory" / "data" / "minilm"
MADE = Provenance(origin="made", generator="test")


def real(path: Path, *, labelled: bool = False) -> pl.DataFrame:
    rows = [row for row in read_rows(path) if isinstance(row, Sample)]
    return samples_frame(row.model_copy(update={"label": row.output}) if labelled else row for row in rows)


def bank() -> pl.DataFrame:
    return real(BANK, labelled=True)


def verdict(sample: Sample, seeds: pl.DataFrame, **settings: Any) -> dict[str, Any]:
    [row] = Rules(**settings).judge(frame(sample), FakeContext(seeds=seeds)).to_dicts()
    return row | {"detail": json.loads(row["detail"])}


def asked(text: str, **settings: Any) -> str | None:
    """The reason that a new message to the bank is rejected for."""
    return verdict(chat(text, "failed_transfer"), bank(), **settings)["reason"]  # type: ignore[no-any-return]


def answered(text: str, **settings: Any) -> str | None:
    """The reason that a new answer is rejected for, in a task with free answers."""
    seeds = real(DATA / "self_instruct.jsonl")
    sample = Sample(
        messages=(Message(role="user", content="Name a good way to spend a rainy day."), Message(role="assistant", content=text)),
        provenance=MADE,
    )
    return verdict(sample, seeds, **settings)["reason"]  # type: ignore[no-any-return]


FALL_AND_STAY = [
    ("empty", " \n ", "Help me"),
    ("empty", "?!", "Help me?!"),
    ("control characters", "Why did my trans\x07fer fail?", "Why did my\ttransfer fail?"),
    ("control characters", "Why was the caf� payment refused?", "Why was the café payment refused?"),
    ("refusal", "As an AI language model, I have no account.", "As an air hostess I get paid abroad."),
    ("refusal", "I'm sorry, but I can't do that.", "I'm sorry, but the money has not arrived."),
    ("refusal", "I am unable to assist you with transfers.", "I am unable to make any transfers."),
    ("boilerplate", "Sure, here is a message about a card.", "Sure I sent it, where is it now?"),
    ("boilerplate", "Here are five messages from customers:", "Here are the details of the failed payment."),
    ("boilerplate", "Hello. How can I help you?", "Hello. How can I get help with this?"),
    ("scaffolding", "1. The payment keeps bouncing.", "100 dollars never showed up."),
    ("scaffolding", "- The payment keeps bouncing.", "The payment - again! - keeps bouncing."),
    ("scaffolding", "Message: The payment keeps bouncing.", "The message: your payment bounced. Why?"),
    ("scaffolding", "Customer 3: The payment keeps bouncing.", "Customers of mine say that it bounced."),
    ("scaffolding", "I use your app. 5. It failed on me.", "I paid 5. It failed on me."),
    ("placeholder", "My name is [NAME] and it failed.", "My name is Ann [her account] and it failed."),
    ("placeholder", "I sent <insert amount> to Bob.", "I sent an amount < 50 to Bob, > 20 to Al."),
    ("placeholder", "A question about {topic} please.", "A question about my topics please."),
    ("placeholder", "Lorem ipsum dolor sit amet.", "The lorem shop got no money."),
    ("markup", "Why did it <b>fail</b> today?", "Why did it fail if 3 < 5 and 7 > 6?"),
    ("markup", "**Why** did my payment fail?", "Why * did my payment fail?"),
    ("markup", "Did it fail?</s>", "Did it fail/s?"),
    ("url", "See https://bank.example/help please.", "See the web page at http please."),
    ("unbalanced", '"Why did this one not go through?', 'Why did "this" one not go through?'),
    ("unbalanced", '"Why did this one not go through?"', '"This" is why it did not go "through"?'),
    ("unbalanced", "Why did this one not go through)", "Why did this one not go through :)"),
    ("unfinished", "I sent it yesterday and", "I sent it yesterday and again"),
    ("unfinished", "I want to send this to my", "I want to send this to him"),
    ("unfinished", "I tried three times,", "I tried three times"),
    ("unfinished", "It says that my transfer...", "It says ... that my transfer broke"),
    ("few letters", "2018-10-24 17:10:58 17:10 ok", "On 2018-10-24 it did not go through"),
    ("repetition", "Pleaseeeeee tell me why it broke", "Pleaseee tell me why it broke"),
    (
        "repetition",
        "I can't send money today and I can't send money today and I can't send money today",
        "I can't send money today and I couldn't send money on Friday or on Monday either",
    ),
    ("repetition", "\n".join(["Why is it gone today?"] * 3), "Why is it gone today?\nWhere did it go?\nAnd to whom?"),
    ("language", "Ich habe gestern Geld überwiesen, es ist noch nicht angekommen.", "The Überweisung to Müller in Köln has not arrived."),
    ("language", "Pourquoi mon virement a-t-il été refusé ?", "Pourquoi? I mean, why was my transfer refused?"),
    ("language", "¿Por qué fue rechazada mi transferencia?", "Por favor, why was my transfer rejected?"),
    ("language", "我昨天转账了，但是还没到。我想取消这笔付款。", "I sent money to 王 yesterday and want to cancel it."),
    ("copied", "WHAT caused my transfer to fail", "What caused my salary to bounce?"),
    ("copied", "The attempted transfers failed.", "The attempted payment to Rome failed."),
    (
        "copied",
        "I need immediate assistance in canceling a transfer which was a mistake. Please help me right now so this does not go through.",
        "I need immediate assistance because a transfer that I never made was taken from me. Please help me so it comes back.",
    ),
    (
        "copied",
        "I was trying to make a transfer and got an error message telling me it was not possible.",
        "I was trying to make a payment to my landlord and got a red box that I had never seen before.",
    ),
    (
        "copied",
        "Good morning. I accidentally sent it twice. I was trying to make a transfer and got an error message telling me it was not "
        "possible to make the transfer. This has never happened before, what happened? I am waiting at the counter with my two children.",
        "Good morning. I was trying to pay and got an error that I have never seen before. I am waiting at the counter with two children.",
    ),
]


@pytest.mark.parametrize(("rule", "falls", "stays"), FALL_AND_STAY, ids=[f"{i}-{row[0]}" for i, row in enumerate(FALL_AND_STAY)])
def test_each_rule_takes_what_it_means_and_nothing_beside_it(rule: str, falls: str, stays: str) -> None:
    assert asked(falls) == rule
    assert asked(stays) is None
    assert asked(falls, off=[rule]) != rule


ANSWERS = [
    ("empty", "  ", "No"),
    ("refusal", "I'm sorry, but I cannot answer that.", "Say that you are sorry, but stay in bed."),
    ("boilerplate", "Sure! Here is a way: read a book.", "Sure ways are a book and a bath."),
    ("scaffolding", "Answer: read a book.", "1. Read a book\n2. Take a bath"),
    ("markup", "**Read** a book.", "Read - a - book."),
    ("unfinished", "Read a book or the", "Read a book or two"),
    (
        "language",
        "Lesen Sie ein gutes Buch und trinken Sie dazu einen heißen Tee mit Honig.",
        "Ragu alla Bolognese\nSpaghetti alla Carbonara\nArancini",
    ),
    ("repetition", "read a book and read a book and read a book and read a book", "read a book and then tell a friend what was in it"),
]


@pytest.mark.parametrize(("rule", "falls", "stays"), ANSWERS, ids=[row[0] for row in ANSWERS])
def test_the_answer_is_held_to_rules_as_well(rule: str, falls: str, stays: str) -> None:
    assert answered(falls) == rule
    assert answered(stays) is None


@pytest.mark.parametrize(
    "rows", [bank(), real(DATA / "gsm8k.jsonl"), real(DATA / "self_instruct.jsonl")], ids=["banking77", "gsm8k", "self_instruct"]
)
def test_no_real_row_is_rejected_beside_the_others(rows: pl.DataFrame) -> None:
    for i in range(len(rows)):
        others = rows.filter(pl.int_range(pl.len()) != i)
        [row] = Rules().judge(rows[i : i + 1], FakeContext(seeds=others)).to_dicts()
        assert row["keep"], (rows["input"][i], row)


@pytest.mark.parametrize(
    "text", ["help pls", "asap pls", "no se", "Transfer fehlt", "why my transfer", "transfer not there", "$40, 3 ft, ASAP"]
)
def test_a_text_too_short_to_tell_its_language_is_let_through(text: str) -> None:
    assert asked(text, off=["too short", "few letters"]) is None


def test_languages_can_be_named_or_left_open() -> None:
    german = "Ich habe gestern Geld überwiesen, es ist noch nicht angekommen."
    assert asked(german, language=["de"]) is None
    assert asked("My money was sent yesterday and has still not arrived.", language=["de"]) == "language"
    assert asked(german, language=None) is None
    with pytest.raises(ValidationError, match="no language has the code english"):
        Rules(language=("english",))


def test_a_second_language_of_the_seeds_is_theirs_too() -> None:
    seeds = pl.concat(
        [bank(), frame(chat("Warum ist meine Überweisung an den Vermieter noch nicht angekommen?", "failed_transfer", origin="real"))]
    )
    sample = chat("Ich habe gestern Geld geschickt und es ist noch nicht da.", "failed_transfer")
    assert verdict(sample, seeds)["keep"]
    assert not verdict(sample, bank())["keep"]


def test_limits_hold_on_the_line() -> None:
    four = "the money never came"
    assert asked(four, min_words=4, max_words=4, min_chars=20, max_chars=20) is None
    assert asked(four, min_words=5) == asked(four, min_chars=21) == "too short"
    assert asked(four, max_words=3) == asked(four, max_chars=19) == "too long"
    assert asked("我昨天转账", language=None, min_words=5, max_words=5, copied=None, length=None) is None  # where words have no spaces


def test_lengths_are_bounded_by_the_seeds() -> None:
    longest = int(bank()["input"].str.len_chars().max())  # type: ignore[arg-type]
    text = "my money left on Monday, "
    line = ("".join(f"{text}{i} " for i in range(100)))[: longest * 4 - 1] + "!"
    assert len(line) == longest * 4
    assert asked(line, repeated=None) is None
    assert asked(f"{line}!", repeated=None) == "too long"
    assert asked(f"{line}!", repeated=None, length=None) is None
    assert asked("why") == "too short"  # the shortest seed has 22 characters
    row = verdict(chat(f"{line}!", "failed_transfer"), bank(), repeated=None)
    assert row["score"] == longest * 4 + 1
    assert row["detail"]["limit"] == longest * 4


def test_a_score_says_how_close_it_was() -> None:
    row = verdict(chat("The attempted transfers failed.", "failed_transfer"), bank())
    assert row["score"] == pytest.approx(row["detail"]["value"], abs=1e-3)
    assert row["detail"] | {"value": 0} == {
        "rule": "copied", "part": "input", "value": 0, "limit": 0.9, "words": 4, "copied": row["detail"]["copied"], "repeated": 0.0,
    }  # fmt: skip
    assert 0.9 <= row["score"] < 1
    assert asked("The attempted transfers failed.", copied=row["score"] + 0.001) is None
    kept = verdict(chat("What caused my salary to bounce?", "failed_transfer"), bank())
    assert kept["keep"]
    assert 0.3 < kept["detail"]["copied"] < 0.9


def test_a_label_must_be_one_of_the_seeds() -> None:
    assert verdict(chat("My money is gone since Monday", "failed_transfer"), bank())["reason"] is None
    assert verdict(chat("My money is gone since Monday", "lost_money"), bank())["reason"] == "unknown label"
    mixed = chat("My money is gone since Monday", "lost money").model_copy(update={"label": "failed_transfer"})
    assert verdict(mixed, bank())["reason"] == "unknown label"


def test_patterns_of_the_recipe() -> None:
    assert asked("why is it late?", require=[r"\?$"]) is None
    assert asked("tell me why it is late", require=[r"\?$"]) == "required"
    assert asked("My Barclays money is late", forbid=[r"(?i)\bbarclays\b"]) == "forbidden"
    assert answered("No idea.", output={"forbid": ["idea"]}) == "forbidden"
    with pytest.raises(ValidationError, match="no lookaround"):
        Rules(forbid=("(?=a)",))


def test_what_real_rows_do_is_allowed_and_said() -> None:
    """GSM8K's answers end with `#### 42`, which is a Markdown heading elsewhere."""
    seeds, ctx = real(DATA / "gsm8k.jsonl"), FakeContext(seeds=real(DATA / "gsm8k.jsonl"))
    question = (
        "Ann has 3 red pens and twice as many blue pens. She gives two pens to each of her three cousins. How many pens does she keep?"
    )

    def answer(text: str) -> Sample:
        return Sample(messages=(Message(role="user", content=question), Message(role="assistant", content=text)), provenance=MADE)

    made = frame(
        answer("She has 3 + 6 = 9 pens and gives 2 * 3 = 6 away.\n#### 3"), answer("She has **9** pens and gives 2 * 3 = 6 away.\n3")
    )
    assert Rules().judge(made, ctx)["reason"].to_list() == [None, "markup"]
    assert len(ctx.reports["off"]) == 1
    assert ctx.reports["off"][0].startswith("markup (output)")
    assert (
        verdict(answer("She has 3 + 6 = 9 pens and gives 2 * 3 = 6 away.\n#### 3"), real(DATA / "self_instruct.jsonl"))["reason"]
        == "markup"
    )
    assert len(seeds) > 0


def test_conversations_are_judged_by_what_the_user_says() -> None:
    turns = (
        ("user", "Where is my money?"),
        ("assistant", "How can I help you?"),
        ("user", "It left on Monday."),
        ("assistant", "It is on its way."),
    )
    sample = Sample(messages=tuple(Message(role=role, content=text) for role, text in turns), provenance=MADE)  # type: ignore[arg-type]
    assert verdict(sample, real(DATA / "self_instruct.jsonl"))["reason"] is None


def test_preferences_and_texts() -> None:
    def preference(chosen: str, rejected: str) -> Sample:
        return Sample(
            messages=(Message(role="user", content="Name a good way to spend a rainy day."),),
            chosen=(Message(role="assistant", content=chosen),),
            rejected=(Message(role="assistant", content=rejected),),
            provenance=MADE,
        )

    seeds = frame(preference("Read a book.", "Go out."), preference("Bake a cake for a friend of yours.", "Do not."))
    assert verdict(preference("Watch a film with friends.", "Sulk."), seeds, copied=None)["reason"] is None
    assert verdict(preference("Sulk.", "Sulk."), seeds, copied=None)["reason"] == "no preference"
    assert verdict(preference("Watch a film.", " "), seeds, copied=None)["reason"] == "empty"
    texts = frame(Sample(text="The tide comes in twice a day.", provenance=MADE), Sample(text="Foxes sleep in the open.", provenance=MADE))
    assert verdict(Sample(text="Owls hear a mouse below the snow.", provenance=MADE), texts)["reason"] is None
    assert verdict(Sample(text="Foxes sleep in the open!", provenance=MADE), texts)["reason"] == "copied"


def test_without_seeds_the_rules_that_need_none_hold() -> None:
    nothing = FakeContext().seeds
    assert verdict(chat("Why is my money late?", "late"), nothing)["reason"] is None
    assert verdict(chat("Warum ist mein Geld noch nicht da?", "late"), nothing)["reason"] is None
    assert verdict(chat("1. Why is my money late?", "late"), nothing)["reason"] == "scaffolding"


def test_one_verdict_a_row_in_any_batch() -> None:
    rows = frame(*(chat(text, "failed_transfer") for _, falls, stays in FALL_AND_STAY for text in (falls, stays) if text not in ("",)))
    rows = rows.unique("id", maintain_order=True)
    ctx = FakeContext(seeds=bank())
    whole = Rules().judge(rows, ctx)
    assert whole.schema == VERDICTS
    assert whole["sample"].to_list() == rows["id"].to_list()
    assert set(whole["reason"].drop_nulls()) <= set(NAMES)
    assert (whole["keep"] == whole["reason"].is_null()).all()
    parts = pl.concat([Rules().judge(rows[i : i + 7], ctx) for i in range(0, len(rows), 7)])
    assert parts.equals(whole)
    assert Rules().judge(rows.clear(), ctx).schema == VERDICTS
    everything_off = Rules(off=NAMES).judge(rows, ctx)
    assert everything_off["keep"].all()


def test_the_data_of_these_tests_is_read_whole() -> None:
    for path in DATA.glob("*.jsonl"):
        assert not [row for row in read_rows(path) if isinstance(row, Failure)]


# -- formats, tools, tokens, turns, and what is learned ------------------------------------------------------------------------


def turns(*said: tuple[str, str], **given: Any) -> Sample:
    return Sample(messages=tuple(Message(role=role, content=text) for role, text in said), provenance=MADE, **given)  # type: ignore[arg-type]


def reply(text: str, seeds: pl.DataFrame | None = None, **settings: Any) -> dict[str, Any]:
    """The verdict on an answer, without the rules that need seeds of its kind."""
    nothing = FakeContext().seeds
    return verdict(
        turns(("user", "What is in the shop today, please?"), ("assistant", text)), nothing if seeds is None else seeds, **settings
    )


FORMATS = [
    ("json", '{"a": [1, 2.5e3, null]}', None),
    ("json", "3", None),
    ("json", '{"a": 1, "a": 2}', "stands twice"),
    ("json", '{"a": {"b": 1}, "c": [{"b": 1, "d": ":", "b": ":"}]}', "stands twice"),
    ("json", '{"a:b": ":", "c": "\\":"}', None),
    ("json", "{'a': 1}", "string key"),
    ("json", '{"a": NaN}', "unexpected"),
    ("json", '```json\n{"a": 1}\n```', "code fence"),
    ("yaml", "a: 1\nb: [x, y]", None),
    ("yaml", "a: 1\na: 2", "stands twice"),
    ("yaml", "Just some prose", "neither a mapping nor a list"),
    ("yaml", "a: !!python/name:os.system", "safe loader"),
    ("yaml", "a: [1", "expected"),
    ("yaml", "- a\n---\n- b", "several documents"),
    ("xml", "<a><b c='1'>text</b></a>", None),
    ("xml", "<a><b></a></b>", "mismatched"),
    ("xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
]


@pytest.mark.parametrize(("format", "text", "what"), FORMATS)
def test_an_answer_is_in_its_format(format: str, text: str, what: str | None) -> None:
    row = reply(text, output={"format": format}, off=["markup", "unbalanced", "language", "unfinished"])
    assert row["reason"] == (None if what is None else "format")
    assert what is None or what in row["detail"]["what"]


def test_a_code_fence_is_allowed_where_the_seeds_have_one(tmp_path: Path) -> None:
    fenced = turns(("user", "What is in the shop today, please?"), ("assistant", '```json\n{"a": 1}\n```'))
    seeds = frame(
        *(
            fenced.model_copy(update={"messages": (Message(role="user", content=f"Is it open on day {n}?"), fenced.messages[1])})
            for n in range(5)
        )
    )
    assert verdict(fenced, seeds, output={"format": "json"}, copied=None)["reason"] is None
    assert Rules.model_validate({"output": {"format": "json"}}).check(seeds) is None
    assert "5 of 5 seeds' outputs are not as yaml asks" in (Rules.model_validate({"output": {"format": "xml"}}).check(seeds) or "").replace(
        "xml", "yaml"
    )


def test_an_answer_fits_its_schema(tmp_path: Path) -> None:
    schema = tmp_path / "answer.schema.json"
    schema.write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}')
    settings = {"output": {"schema_file": schema}, "off": ["language"]}
    assert reply('{"a": 1}', **settings)["reason"] is None
    assert reply('{"a": 1', **settings, length=None)["reason"] == "unfinished"
    row = reply('{"a": "x"}', **settings)
    assert row["reason"] == "schema"
    assert "$.a" in row["detail"]["what"]
    assert reply("a: x", output={"format": "yaml", "schema_file": schema}, off=["language"])["reason"] == "schema"
    with pytest.raises(ValidationError, match="says nothing of XML"):
        Rules.model_validate({"output": {"format": "xml", "schema_file": schema}})
    schema.write_text('{"type": "nonsense"}')
    with pytest.raises(ValidationError, match="not a JSON schema"):
        Rules.model_validate(settings)
    with pytest.raises(ValidationError, match="can't be read"):
        Rules.model_validate({"output": {"schema_file": tmp_path / "none.json"}})


TOOLS = [
    {
        "type": "function",
        "function": {"name": "pay", "parameters": {"type": "object", "required": ["to"], "properties": {"to": {"type": "string"}}}},
    }
]
CALLS = [
    ('<tool_call>{"name": "pay", "arguments": {"to": "Ann"}}</tool_call>', None),
    ('<tool_call>\n{"name": "pay", "arguments": "{\\"to\\": \\"Ann\\"}"}\n</tool_call>', None),
    ('<tool_call>{"name": "pey", "arguments": {}}</tool_call>', "no tool is called 'pey'"),
    ('<tool_call>{"name": "pay", "arguments": "{to: Ann}"}</tool_call>', "are not JSON"),
    ('<tool_call>{"name": "pay", "arguments": {"to": 3}}</tool_call>', "break its schema"),
    ('<tool_call>{"name": "pay", "arguments": {"to": "Ann"}}', "is not closed"),
    ("<tool_call>pay Ann</tool_call>", "a call is not JSON"),
    ('{"tool_calls": [{"type": "function", "function": {"name": "pay", "arguments": "{}"}}]}', "break its schema"),
    ('{"name": "pay", "parameters": {"to": "Ann"}}', None),
    ('{"name": "pey", "parameters": {"to": "Ann"}}', "no tool is called"),
    ('{"name": "Ann", "age": 3}', None),
]


@pytest.mark.parametrize(("text", "what"), CALLS)
def test_a_call_names_a_tool_and_gives_what_it_takes(text: str, what: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    said = (("user", "Pay five pounds to Ann, please."), ("assistant", text))
    for sample, settings in ((turns(*said), {"tools_file": path}), (turns(*said, meta={"tools": TOOLS}), {})):
        row = verdict(sample, FakeContext().seeds, **settings)
        assert row["reason"] == (None if what is None else "tool call")
        assert what is None or what in row["detail"]["what"]
    path.write_text('[{"parameters": {}}]')
    with pytest.raises(ValidationError, match="a tool in it has no name"):
        Rules(tools_file=path)


PARAMETERS: list[tuple[Any, str]] = [
    ({"$ref": "#/$defs/none"}, "leads nowhere"),
    ({"properties": {"to": {"$ref": "https://example.com/to.json"}}}, "leads nowhere"),
    ({"title": "pay", "$ref": "#/title"}, "leads nowhere"),  # to no schema
    ({"minProperties": 1, "$ref": "#/minProperties/a"}, "leads nowhere"),
    ({"prefixItems": [True], "$ref": "#/prefixItems/a"}, "leads nowhere"),
    ({"$dynamicRef": "#none"}, "can't be read"),
    ({"default": {"type": "nonsense"}, "$ref": "#/default"}, "can't be read"),
    ({"default": {"pattern": "("}, "properties": {"to": {"$ref": "#/default"}}}, "can't be read"),
]


@pytest.mark.parametrize(("parameters", "what"), PARAMETERS)
def test_a_tool_whose_schema_leads_nowhere_is_a_fault_of_its_row(parameters: Any, what: str, tmp_path: Path) -> None:
    tools = [{"name": "pay", "parameters": parameters}]
    said = (
        ("user", "Pay five pounds to Ann, please."),
        ("assistant", '<tool_call>{"name": "pay", "arguments": {"to": "Ann"}}</tool_call>'),
    )
    row = verdict(turns(*said, meta={"tools": tools}), FakeContext().seeds)
    assert row["reason"] == "tool call"
    assert what in row["detail"]["what"]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(tools))
    if what == "leads nowhere":
        with pytest.raises(ValidationError, match="leads nowhere"):
            Rules(tools_file=path)


def test_tokens_are_those_of_a_named_tokenizer() -> None:
    tokenizer = MINILM / "tokenizer.json"
    text = "It is open."  # four tokens: it, is, open, full stop
    assert reply(text, tokenizer_file=tokenizer, output={"min_tokens": 4, "max_tokens": 4})["reason"] is None
    row = reply(text, tokenizer_file=tokenizer, output={"max_tokens": 3})
    assert (row["reason"], row["score"], row["detail"]["what"]) == ("too long", 4, "tokens")
    assert reply(text, tokenizer_file=tokenizer, output={"min_tokens": 5})["reason"] == "too short"
    assert reply(text, tokenizer_file=tokenizer, total_tokens=13)["reason"] is None
    assert reply(text, tokenizer_file=tokenizer, total_tokens=12)["detail"]["part"] == "row"
    with pytest.raises(ValidationError, match="Name its tokenizer"):
        Rules(max_tokens=3)
    with pytest.raises(ValidationError, match="there is no tokenizer 'no/such'"):
        Rules(tokenizer="no/such")
    with pytest.raises(ValidationError, match="a file is named by tokenizer_file"):
        Rules(tokenizer=str(tokenizer))
    with pytest.raises(ValidationError, match=r"name a tokenizer\.json, or a folder with one"):
        Rules(tokenizer_file=MINILM / "none")
    with pytest.raises(ValidationError, match=r"is no tokenizer\.json"):
        Rules(tokenizer_file=Path(__file__))


def test_a_tokenizer_of_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--student" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((MINILM / "tokenizer.json").read_bytes())
    (tmp_path / "models--some--student" / "refs").mkdir()
    (tmp_path / "models--some--student" / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert reply("It is open.", tokenizer="some/student", output={"max_tokens": 3})["score"] == 4
    with pytest.raises(ValidationError, match="two tokenizers"):
        Rules(tokenizer="some/student", tokenizer_file=MINILM)


def test_the_file_of_a_tokenizer_lies_by_its_recipe_and_is_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "recipe"
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "tokenizer.json").write_bytes((MINILM / "tokenizer.json").read_bytes())
    (folder / "student" / "weights").write_text("1")
    (folder / "seeds.jsonl").write_bytes(BANK.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def digest(where: str) -> str:
        asked = {"tokenizer_file": where, "total_tokens": 9}
        recipe = {"name": "bank", "target": {"accepted": 1}, "teachers": {"one": {"kind": "fake"}}}
        stages = [{"seeds": {"path": "seeds.jsonl"}}, {"compose": {"teachers": ["one"]}}, {"rules": asked}]
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": stages}))
        return load_recipe(folder).digest

    before = digest("student")
    (folder / "student" / "weights").write_text("2")
    assert digest("student") == digest("student/tokenizer.json") == before
    file = folder / "student" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert digest("student") != before


ORDERS = [
    ("sua", True),
    ("ua", True),
    ("uaua", True),
    ("uata", True),
    ("usa", False),
    ("uua", False),
    ("uaa", False),
    ("au", False),
    ("ssua", False),
    ("tua", False),
]


@pytest.mark.parametrize(("order", "proper"), ORDERS)
def test_turns_follow_each_other(order: str, proper: bool) -> None:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    said = [(roles[letter], f"Turn {n} is about the shop at the corner.") for n, letter in enumerate(order)]
    row = verdict(turns(*said), FakeContext().seeds)
    assert row["reason"] == (None if proper else "roles")
    assert verdict(turns(*said), frame(*[turns(*said)] * 3), copied=None)["reason"] is None  # the seeds do so as well
    empty = [("user", "Where is it?"), ("assistant", " "), ("user", "Where is the shop?"), ("assistant", "At the corner.")]
    assert verdict(turns(*empty), FakeContext().seeds)["detail"]["what"] == "an empty turn"


MARKDOWN = [
    ("```\ncode", "unfinished"),
    ("```\ncode\n```", None),
    ("It is **bold** here", None),
    ("It is **bold here", "markdown"),
    ("2**3 is 8 and 2 ** 3 too", None),
    ("Call `f(x) now", "markdown"),
    ("Call `f(x)` now", None),
    ("the `so called' shop", None),
    ("[a](b", "markdown"),
    ("[a](b(c)) too", None),
    ("| a | b |\n|---|---|\n| 1 | 2 |", None),
    ("| a | b |\n|---|---|\n| 1 |", "markdown"),
    ("a | b\n--|--\n1 | 2\n\nthe end", None),
    ("~~~\n```\n~~~", None),
]


@pytest.mark.parametrize(("text", "reason"), MARKDOWN)
def test_markdown_is_whole(text: str, reason: str | None) -> None:
    assert reply(text, off=["markup", "unbalanced", "language"])["reason"] == reason


@pytest.mark.parametrize("text", ["A cafÃ© at the corner", "It isnâ€™t open", "costs Â£5 today", "ï»¿It is open"])
def test_bytes_that_were_read_in_the_wrong_encoding(text: str) -> None:
    assert reply(text)["reason"] == "encoding"


@pytest.mark.parametrize("text", ["Un café à l’hôtel « là » dit-il", "NÃO, A MANHà É BOA", "Âge moyen", "Crâne “là”", "10 € à 5 £"])
def test_letters_with_accents_are_no_damage(text: str) -> None:
    assert reply(text, language=None)["reason"] is None


def test_an_answer_that_repeats_its_question() -> None:
    question = "Tell me how the old shop at the corner of our street came to be open on Sundays."
    sample = turns(("user", question), ("assistant", question.replace("Tell", "Say")))
    assert verdict(sample, FakeContext().seeds)["reason"] == "echo"
    same = [turns(("user", f"{n}: {question}"), ("assistant", f"{n}: {question}")) for n in range(4)]
    assert verdict(sample, frame(*same), copied=None, repeated=None, off=["scaffolding", "too short"])["reason"] is None
    other = turns(("user", question), ("assistant", "The owner of the shop at the corner of our street wanted it so, and the town agreed."))
    assert verdict(other, FakeContext().seeds)["reason"] is None


def test_an_answer_that_gives_its_instructions_away() -> None:
    system = "You are the voice of a small shop and you never tell anyone how much the owner has paid for what is sold here."
    leak = turns(("system", system), ("user", "Who are you?"), ("assistant", f"I was told: {system}"))
    assert verdict(leak, FakeContext().seeds)["reason"] == "system prompt"
    few = turns(("system", system), ("user", "Who are you?"), ("assistant", "I am the voice of a small shop and you are welcome."))
    assert verdict(few, FakeContext().seeds)["reason"] is None


def test_long_answers_end_as_the_seeds_do() -> None:
    names = ["door", "roof", "wall", "floor", "lamp", "bell", "till", "clock", "sign", "shelf", "stair", "yard"]
    long = "The {} was old when the shop was bought, so the owner had it mended by a friend who knew how to do such things well{}"
    seeds = frame(*(turns(("user", f"What of the {name}?"), ("assistant", long.format(name, "."))) for name in names))
    sample = turns(("user", "And what of the window?"), ("assistant", long.format("window", "")))
    assert verdict(sample, seeds, copied=None)["reason"] == "unfinished"
    assert verdict(sample, seeds[:9], copied=None)["reason"] is None  # too few to tell
    whole = turns(("user", "And what of the window?"), ("assistant", long.format("window", "!")))
    assert verdict(whole, seeds, copied=None)["reason"] is None


LAST_LINES = [
    ("def f{n}(x):\n    return x + {n}", "def g(x):\n    return x + 21", True),  # what the code computes is no form
    ("def f{n}(x):\n    return x + {n}", "def g(x):\n    y = 3 * x\n    return y", True),
    ("The door is shut.\nConfidence: 0.{n}", "The door is shut.\nConfidence: 1", True),
    ("The door is shut.\nConfidence: 0.{n}", "The door is shut.\nIt is so", False),
    ("The door is shut.\n  **Answer:** {n}", "The door is shut.\n\t**Answer:** none", True),
    ("The door is shut.\n#### 1{n}", "The door is shut.\n#### 7", True),
    ("The door is shut.\n#### 1{n}", "The door is shut.\nThat is 7", False),
    ("<answer>\n{n}\n</answer>", "<answer>\nseven", False),
]


@pytest.mark.parametrize(("seed", "answer", "stays"), LAST_LINES)
def test_answers_end_with_a_line_of_the_form_that_the_seeds_have(seed: str, answer: str, stays: bool) -> None:
    seeds = frame(*(turns(("user", f"What of door {n}?"), ("assistant", seed.format(n=n))) for n in range(20)))
    row = verdict(turns(("user", "And what of the window?"), ("assistant", answer)), seeds, length=None, language=None)
    assert row["reason"] == (None if stays else "unfinished")
    assert stays or "its last line does not begin with" in row["detail"]["what"]


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("no no no no no", True),
        ("no No, no no NO no", False),
        ("нет нет нет нет нет нет", False),
        ("아니 아니 아니 아니 아니 아니", False),
        ("[0, 0, 0, 0, 0, 0]", True),
        ("哈哈哈哈哈哈", True),
        ("no no no 0 no no no", True),
        ("no no no 哈 no no no", True),
        ("哈no哈no哈no哈", True),
        ("0 no no no no no no", False),
    ],
)
def test_only_a_word_of_letters_between_spaces_is_said_too_often(text: str, stays: bool) -> None:
    row = reply(text, language=None)
    assert row["reason"] == (None if stays else "repetition")
    assert stays or row["score"] == 6


def test_what_a_pattern_needs_stands_in_whatever_it_finds() -> None:
    """A pattern with `words` or `chars` finds the same as without them."""
    form = yaml.safe_load((Path(rules.__file__).parent / "data" / "form.yaml").read_text())
    entries = [entry for parts in form.values() for listed in parts.values() for entry in listed if isinstance(entry, dict)]
    texts = [text for row in FALL_AND_STAY for text in row[1:]] + [text for row in ANSWERS for text in row[1:]]
    every = frame(*(turns(("user", text or "x")) for text in dict.fromkeys(texts)))
    block = rules._Block(every, rules._form().find, Rules())
    found = 0
    for entry in entries:
        words = sorted({word for other in entries for word in other.get("words", ())})
        told = block.found("input", (rules._pattern(entry, words),))
        assert (told == block.found("input", (rules.Pattern(entry["find"]),))).all(), entry
        found += int(told.sum())
    assert found > 20
