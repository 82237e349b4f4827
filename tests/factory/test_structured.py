import json
import socket
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from referencing.exceptions import Unresolvable

from factory.errors import GristmillError
from factory.structured import Fit, correction, fit, schema_of
from schemas.call import Call, Params
from schemas.sample import Message

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PEOPLE = {
    "type": "object",
    "properties": {"people": {"type": "array", "items": {"$ref": "#/$defs/person"}}},
    "required": ["people"],
    "$defs": {"person": PERSON},
}
ANY: dict[str, object] = {}
ADA = '{"age":36,"name":"Ada"}'


def test_what_fits_comes_back_in_canonical_form():
    assert fit(' {"name": "Zoë",\n "age": 36} ', PERSON) == Fit('{"age":36,"name":"Zoë"}', None, False)


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "Ada", "age": 36}\n```',
        '```\n{"name": "Ada", "age": 36}```',
        'Sure! Here it is:\n\n```json\n{"name": "Ada", "age": 36}\n```\n\nI hope that {this} helps [a lot].',
        'Here is the JSON: {"name": "Ada", "age": 36}. Tell me if you need more.',
        'As in [1], the answer is {"name": "Ada", "age": 36}',
        '{"name": "Ada", "age": 36} {"name": "Ada", "age": 36}',
        '{"name": "Ada", "age": 36}}',
        '{"name": "Ada", "age": 36,}',
        "{'name': 'Ada', 'age': 36}",
        "Here: {'name': 'Ada', 'age': 36}. Done.",
        '{name: "Ada", age: 36}',
        '{"name": "Ada" "age": 36}',
        '{"name": "Ada",, "age": 36}',
        '{"age": 36, "name": "Ada"',
        "{“name”: “Ada”, “age”: 36}",
        '\ufeff{"name": "Ada", "age": 36}',
        '```json\n{"name": "Ada", "age": 36,}\n```',
        '```json\n// a person\n{"name": "Ada", "age": 36}\n```',
    ],
)
def test_what_stands_around_it_and_broken_punctuation_are_mended(text):
    assert fit(text, PERSON) == Fit(ADA, None, True)
    assert fit(text, PERSON, cut=True).text is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "he said "hi" to me"}', {"a": 'he said "hi" to me'}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{"a": "two\\nlines, \\u00e9\\ud83d\\ude00",}', {"a": "two\nlines, é😀"}),
        ('{"a": "C:\\\\new",}', {"a": "C:\\new"}),
        ("{'a': True, 'b': None, 'c': [], 'd': '', 'e': 1.50}", {"a": True, "b": None, "c": [], "d": "", "e": 1.5}),
        ('[{"a": [1, -2,]}, {"b": 1e5,}]', [{"a": [1, -2]}, {"b": 1e5}]),
        ('{"a": [{"b": 1}, {"b": 2}', {"a": [{"b": 1}, {"b": 2}]}),
        ('{"code": "```py\\nx = [1]\\n```",}', {"code": "```py\nx = [1]\n```"}),
        ('{"a": 123456789012345678901234567890,}', {"a": 123456789012345678901234567890}),
    ],
)
def test_a_repair_keeps_all_that_was_said(text, value):
    found = fit(text, ANY)
    assert found.repaired
    assert json.loads(found.text) == value


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36, "na',  # the words of a cut key would be lost
        '{"name": "Ada", "mood": "go',  # a cut string would look whole
        '{"age": 3, "name": "see [1]',
        "{'age': 3, 'name': 'see [1]",
        '{"name": "Ada", "age": 3',  # a cut number too
        '{"name": "Ada", "age": ',
        '{"name": "Ada", "age": 36, "',
        '{"name": "Ada", "b": {"c": 1}, "d": "Al',
        '{"a": , "b": 2}',  # nothing would become an empty string
        '{"a"}',
        '["a", "b", ...]',  # the model left something out
        '{"a": 1, "a": 2,}',  # one of the two would be lost
        '{"a": 1 // or 2\n}',
        '{"a": - 5,}',
        '{"a": 007,}',
        '{"a": 50%}',
        "{'a': 'it''s'}",
        "{'a': 'x}', 'b': 1}",  # a bracket within a string is not the end
        "{'a': 1}\n{'b': 2}",
        '{"a": 1}0}',
        '{"a": 1e400,}',
        '"a": [1]}',  # of which [1] is only a part
        "1, [2]]",
        '[1], "b": 2}',
        "[see below]: {'a': 1}",
        "[" * 20_000,
        '{"a":' * 20_000,
    ],
)
def test_a_repair_that_loses_or_invents_something_is_refused(text):
    found = fit(text, ANY)
    assert found.text is None
    assert found.problem
    assert not found.repaired


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "Ada"}', "'age' is a required property; at $"),
        ('{"name": "Ada", "age": "36"}', "'36' is not of type 'integer'; at $.age"),
        ('{"name": "Ada", "age": 36, "mood": "fine"}', "'fine' is not one of ['good', 'bad']; at $.mood"),
        ('{"name": 1, "age": 3.5}', "3.5 is not of type 'integer'; at $.age; and 1 is not of type 'string'; at $.name"),
        ('{"name": "Ada", "age": 36, "job": "x"}', "Additional properties are not allowed ('job' was unexpected); at $"),
        ('Sure: {"name": "Ada"}', "'age' is a required property; at $"),
        ("{'name': 'Ada'}", "'age' is a required property; at $"),
        ('"Ada"', "'Ada' is not of type 'object'; at $"),
        ("I can't do that.", "there is no JSON object or array in it"),
        ("", "there is no JSON object or array in it"),
        ('{"name": "Ada", "age": NaN}', "NaN is not a JSON number"),
        ('{"name": "Ada", "age": -Infinity}', "-Infinity is not a JSON number"),
        ('Sure: {"name": "Ada", "age": NaN}', "NaN is not a JSON number"),
        ('```json\n{"name": "Ada", "age": NaN}\n```', "NaN is not a JSON number"),
        ('{"name": "Ada", "name": "Bob", "age": 1}', "the key 'name' stands twice in one object"),
        ('{"name": "Ada", "age": 1e999}', "a number in it is too large"),
        ('{"name": "Ada", "age": ' + "1" * 5000 + "}", "a number in it is too long"),
        ('{"name": "\\ud83d", "age": 1}', "a string in it holds half of a surrogate pair"),
        ("[" * 100_000 + "]" * 100_000, "it is nested too deep"),
        (
            '{"name": "Ada", "age": 1} or {"name": "Bob", "age": 2}',
            "there are several JSON values in it that fit, and only one is wanted",
        ),
        ('{"name": "Ada", "age": ', 'it is not JSON: Expecting value after \'{"name": "Ada", "age": \''),
    ],
)
def test_a_problem_is_said_in_words_that_a_model_can_act_on(text, problem):
    assert fit(text, PERSON) == Fit(None, problem, False)


def test_a_problem_names_the_place():
    text = '{"people": [{"name": "Ada"}, {"name": "Bob", "age": 1}, {"name": "Cy", "age": 2, "mood": "so so"}]}'
    assert fit(text, PEOPLE).problem == (
        "'age' is a required property; at $.people[0]; and 'so so' is not one of ['good', 'bad']; at $.people[2].mood"
    )
    assert fit(text.replace("Ada", 'Ada", "age": "x'), PEOPLE).problem.startswith("'x' is not of type 'integer'; at $.people[0].age")


def test_a_problem_of_alternatives_is_that_of_the_likeliest_one():
    either = {"anyOf": [{"type": "null"}, PERSON]}
    assert fit('{"name": "Ada", "age": "x"}', either).problem == "'x' is not of type 'integer'; at $.age"


def test_a_problem_stays_short():
    found = fit(json.dumps({"people": ["word " * 1000] * 100}), PEOPLE)
    assert len(found.problem) < 2000
    assert found.problem.endswith("is not of type 'object'; at $.people[4]")


def test_a_cut_answer_is_only_taken_as_it_stands():
    assert fit('{"name": "Ada", "age": 36}', PERSON, cut=True).text == ADA
    assert fit('{"name": "Ada", "age": 36', PERSON, cut=True) == Fit(None, "the answer was cut off before its JSON ended", False)
    assert fit("12", {"type": "integer"}, cut=True).text is None  # it may have been 120
    assert fit("12", {"type": "integer"}).text == "12"
    assert fit("true", {"type": "boolean"}, cut=True).text == "true"


def test_numbers_are_kept_as_they_are():
    assert fit("[1, 1.0, 1e2, 123456789012345678901234567890, -0.0]", ANY).text == "[1,1.0,100.0,123456789012345678901234567890,-0.0]"
    assert fit("[1.0]", {"items": {"type": "integer"}}).text == "[1.0]"
    assert fit("1" + "0" * 400, {"multipleOf": 0.5}).problem == "a number in it is too large"


def test_two_schemas_of_one_content_are_one_and_a_changed_schema_is_another():
    schema = {"type": "object", "required": ["a"]}
    assert fit("{}", schema).problem == "'a' is a required property; at $"
    schema["required"] = ["b"]
    assert fit("{}", schema).problem == "'b' is a required property; at $"


def test_a_fence_may_hold_any_value():
    assert fit('```json\n"yes"\n```', {"enum": ["yes", "no"]}) == Fit('"yes"', None, True)


def test_nothing_is_fetched_for_a_reference():
    with socket.create_server(("127.0.0.1", 0)) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonschema only warns before it fetches
        server.setblocking(False)
        socket.setdefaulttimeout(1)  # so that this test would end if it did
        try:
            with pytest.raises(Unresolvable):
                fit("{}", {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/person.json"})
        finally:
            socket.setdefaulttimeout(None)
        with pytest.raises(BlockingIOError):
            server.accept()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_any_value_that_fits_comes_back_equal(value, ascii_only):
    found = fit(json.dumps(value, ensure_ascii=ascii_only), ANY)
    assert found.problem is None and not found.repaired
    assert json.loads(found.text) == value


@given(json_values)
def test_any_object_comes_back_out_of_a_fence_and_out_of_prose(value):
    text = json.dumps({"it": value})
    for around in (f"```json\n{text}\n```", f"Here:\n{text}\nDone."):
        found = fit(around, ANY)
        assert found.repaired
        assert json.loads(found.text) == {"it": value}


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(plain_values, st.data())
def test_a_repair_neither_loses_nor_adds_a_letter_or_a_digit(value, data):
    text = json.dumps({"it": value})
    place = data.draw(st.integers(0, len(text) - 1))
    more = data.draw(st.sampled_from(["", *',:"{}[]']))
    broken = text[:place] + more + text[place + (not more) :]  # a character too few, or one too many
    found = fit(broken, ANY)
    if found.repaired:
        assert sorted(filter(str.isalnum, found.text)) == sorted(filter(str.isalnum, broken))


# Without what a repair may trim: white space and quotes.
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Z"], exclude_characters="\"'\\"), max_size=12)


@settings(max_examples=50)
@given(st.fixed_dictionaries({"name": words, "note": words}), st.integers())
def test_no_beginning_of_an_answer_passes_for_the_whole(said, age):
    value = said | {"age": age}
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "note": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name"],
    }
    text = json.dumps(value, ensure_ascii=False)
    for end in range(len(text)):
        assert fit(text[:end], schema, cut=True).text is None
        found = fit(text[:end], schema)
        assert found.text is None or json.loads(found.text).items() <= value.items()


@given(st.text())
def test_no_text_is_too_odd(text):
    for odd in (text, "{" + text, "```\n[" + text + "\n```", '{"a": "' + text):
        found = fit(odd, PERSON)
        assert (found.text is None) != (found.problem is None)


CALL = Call(teacher="t", messages=(Message(role="user", content="Who?"),), params=Params(max_tokens=9), json_schema=PERSON, draw=2, ref="r")


def test_a_correction_shows_the_model_its_answer_and_what_is_wrong_with_it():
    asked = correction(CALL, '{"name": "Ada"}', "'age' is a required property; at $")
    assert asked.messages[:2] == (CALL.messages[0], Message(role="assistant", content='{"name": "Ada"}'))
    assert asked.messages[2].role == "user"
    assert "'age' is a required property; at $" in asked.messages[2].content
    assert json.dumps(PERSON, sort_keys=True, separators=(",", ":")) in asked.messages[2].content
    assert asked.model_copy(update={"messages": CALL.messages}) == CALL
    assert asked.key("p", "m") != CALL.key("p", "m")
    assert len(CALL.messages) == 1


def test_an_empty_answer_makes_no_empty_turn():
    assert correction(CALL, " \n", "there is no JSON").messages[1].content.strip()


def test_a_raw_prompt_cannot_be_corrected():
    assert correction(Call(teacher="t", prompt="{"), "x", "y") is None


def test_a_schema_may_stand_in_the_recipe_or_in_a_file(tmp_path: Path):
    (tmp_path / "person.json").write_text(json.dumps(PERSON, indent="\t"))
    (tmp_path / "answers.yaml").write_text("enum: [yes, no]\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "people.yml").write_text(json.dumps(PEOPLE))
    assert schema_of(PERSON, tmp_path) == PERSON
    assert schema_of("person.json", tmp_path) == PERSON
    assert schema_of("answers.yaml", tmp_path) == {"enum": ["yes", "no"]}
    assert schema_of("deep/people.yml", tmp_path) == PEOPLE


MODEL = """
from __future__ import annotations

from pydantic import BaseModel


class Person(BaseModel):
    name: str
    friends: list[Person] = []


class Group(BaseModel):
    people: list[Person]


class Odd(BaseModel):
    call: type[Exception] | object

    @classmethod
    def __get_pydantic_json_schema__(cls, core, handler):
        raise TypeError("not this one")


total = 3
"""


@pytest.mark.parametrize("where", ["models.py:Group", "models:Group", "deep/models.py:Group", "deep.models:Group"])
def test_a_schema_may_be_a_pydantic_model_in_the_recipes_folder(tmp_path: Path, where):
    (tmp_path / "deep").mkdir()
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "models.py").write_text(MODEL)
    paths, schema = list(sys.path), schema_of(where, tmp_path)
    assert sys.path == paths
    assert fit('{"people": [{"name": "Ada", "friends": [{"name": "Bob"}]}]}', schema).problem is None
    assert fit('{"people": [{"name": "Ada", "friends": [{}]}]}', schema).problem == (
        "'name' is a required property; at $.people[0].friends[0]"
    )


def test_a_schema_may_be_a_pydantic_model_that_is_installed(tmp_path: Path):
    assert schema_of("schemas.sample:Message", tmp_path) == Message.model_json_schema()


def test_two_folders_may_have_modules_of_one_name(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models.py").write_text(f"from pydantic import BaseModel\nclass It(BaseModel):\n    {name}: int\n")
    assert [schema_of("models:It", tmp_path / name)["required"] for name in ("one", "two")] == [["one"], ["two"]]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("none.json", "can't be read: No such file"),
        ("broken.json", "can't be read: Expecting"),
        ("broken.yaml", "can't be read: while parsing"),
        ("latin.json", "can't be read: 'utf-8' codec"),
        ("list.json", "the schema is not a mapping"),
        ("dates.yaml", "not a JSON schema: Object of type date"),
        ({"type": "strin"}, "not a JSON schema: 'strin' is not valid under any of the given schemas; at $.type"),
        ({"properties": {"a": {"pattern": "("}}}, "not a JSON schema: '(' is not a 'regex'; at $.properties.a.pattern"),
        ({"required": "name"}, "not a JSON schema: 'name' is not of type 'array'; at $.required"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "$ref '#/$defs/b' leads nowhere"),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:9/b.json"}}}, "$ref 'http://127.0.0.1:9/b.json' leads nowhere"),
        ("person", "'person' names no schema"),
        ("models.py:", "'models.py:' names no schema"),
        ("nothing.py:Person", "nothing.py can't be imported: FileNotFoundError"),
        ("no_such_module:Person", "no_such_module can't be imported: ModuleNotFoundError"),
        ("fails.py:Person", "fails.py can't be imported: ZeroDivisionError"),
        ("models.py:Persn", "Persn is no pydantic model in models.py"),
        ("models.py:total", "total is no pydantic model in models.py"),
        ("models.py:Odd", "Odd has no JSON schema: not this one"),
    ],
)
def test_what_is_no_schema_is_told(tmp_path: Path, where, what):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "latin.json").write_bytes('{"title": "é"}'.encode("latin-1"))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "dates.yaml").write_text("const: 2026-01-01")
    (tmp_path / "fails.py").write_text("1 / 0")
    (tmp_path / "models.py").write_text(MODEL)
    with pytest.raises(GristmillError) as told:
        schema_of(where, tmp_path)
    assert what in told.value.what
    assert told.value.where


def test_a_reference_may_lead_to_a_schema_with_an_id_of_its_own(tmp_path: Path):
    schema = {"$defs": {"b": {"$id": "http://x/b", "$defs": {"c": True}, "items": {"$ref": "#/$defs/c"}}}, "$ref": "http://x/b"}
    assert schema_of(schema, tmp_path) == schema
    assert fit("[1]", schema).text == "[1]"


def test_a_message_names_the_models_that_there_are(tmp_path: Path):
    (tmp_path / "models.py").write_text(MODEL)
    with pytest.raises(GristmillError) as told:
        schema_of("models.py:Persn", tmp_path)
    assert told.value.next == "It has: Group, Odd, Person."
