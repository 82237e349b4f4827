"""Identity is content: what a model would be trained on makes a sample's id, what changes an answer makes a call's key."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.call import Call, Params
from schemas.canonical import canonical_json, content_hash
from schemas.sample import Message, Provenance, Sample
from schemas.verdict import Verdict

HERE = Provenance(origin="made", generator="02-compose")


def chat(*turns: tuple[str, str], **more: object) -> Sample:
    return Sample.model_validate({"messages": [{"role": r, "content": c} for r, c in turns], "provenance": HERE, **more})


def test_the_same_content_is_the_same_sample_wherever_it_came_from() -> None:
    one = chat(("user", "hi"), ("assistant", "hello"))
    other = chat(("user", "hi"), ("assistant", "hello"), label="greeting", meta={"n": 1}, holdout=True)
    assert one.id == other.id


@pytest.mark.parametrize(
    "other",
    [
        chat(("user", "hi"), ("assistant", "hello!")),
        chat(("user", "hi"), ("user", "hello")),
        chat(("user", "hi hello")),
        Sample(text="hi\nhello", provenance=HERE),
        Sample(
            messages=(Message(role="user", content="hi"),),
            chosen=(Message(role="assistant", content="hello"),),
            rejected=(Message(role="assistant", content="no"),),
            provenance=HERE,
        ),
    ],
)
def test_other_content_is_another_sample(other: Sample) -> None:
    assert chat(("user", "hi"), ("assistant", "hello")).id != other.id


def test_ids_are_stable_over_versions() -> None:
    """A change here orphans every file and ledger there is: it needs a new prefix."""
    assert chat(("user", "hi"), ("assistant", "hello")).id == PINNED_SAMPLE
    assert Call(teacher="t", prompt="1.", params=Params(max_tokens=5, stop=("\n",))).key("local", "m") == PINNED_CALL


PINNED_SAMPLE = "s12a43fea620770bb1d6798cdc0e4ecd76"
PINNED_CALL = "c192ba847d09367d91f8104f750b3ec0d0"


def test_a_call_is_known_by_what_changes_its_answer() -> None:
    call = Call(teacher="small", prompt="1.", params=Params(temperature=1.0))
    key = call.key("local", "m")
    assert call.model_copy(update={"teacher": "renamed", "ref": "x"}).key("local", "m") == key
    assert call.key("openai", "m") != key
    assert call.key("local", "n") != key
    for change in ({"prompt": "2."}, {"draw": 1}, {"params": Params(temperature=0.9)}, {"json_schema": {"type": "object"}}):
        assert call.model_copy(update=change).key("local", "m") != key


def test_canonical_json_knows_no_order_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        content_hash("x", float("nan"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"text": "a", "messages": [{"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_a_sample_is_exactly_one_kind(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sample.model_validate({**fields, "provenance": HERE})


def test_input_and_output_are_what_is_shown_and_what_is_taught() -> None:
    one = chat(("user", "hi"), ("assistant", "hello"))
    assert (one.input, one.output) == ("hi", "hello")
    long = chat(("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long"))
    assert long.input == "system: be kind\nuser: hi\nassistant: hello\nuser: bye"
    assert long.output == "so long"
    assert (chat(("user", "hi")).input, chat(("user", "hi")).output) == ("hi", "")


def test_nouns_are_immutable() -> None:
    with pytest.raises(ValidationError):
        chat(("user", "hi")).label = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Verdict(sample="s", by="b", keep=True).keep = False  # type: ignore[misc]


def test_a_copy_that_asks_for_something_else_has_another_key() -> None:
    call = Call(teacher="t", prompt="p", params=Params(max_tokens=5))
    first = call.key("a", "m")  # from here on the params remember what they ask for
    other = call.model_copy(update={"params": call.params.model_copy(update={"max_tokens": 9})})
    assert other.key("a", "m") == Call(teacher="t", prompt="p", params=Params(max_tokens=9)).key("a", "m") != first
