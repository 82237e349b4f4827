"""Answers as models really write them, and the two promises: no text raises, and what is well-formed is read to the letter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generators.parse import Item, Parsed, continued, parse


def inputs(parsed: Parsed) -> list[str]:
    return [item.input for item in parsed.items]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5. Why was it declined?\n6. My card!\n", ["Why was it declined?", "My card!"]),
        ("1) one\n2) two", ["one", "two"]),
        ("(1) one\n(2) two", ["one", "two"]),
        ("- one\n* two\n• three", ["one", "two", "three"]),
        ('1. "Why?"\n2. “How?”\n3. `when`', ["Why?", "How?", "when"]),
        ("**1.** one\n**2.** two", ["one", "two"]),
        ("### 1. one\n### 2. two", ["one", "two"]),
        ("1. **Curt**: where is it?", ["Curt: where is it?"]),
        ('- "Where is my money', ["Where is my money"]),
        ("1. 3.5 euros are missing\n2. I lost\n   a card", ["3.5 euros are missing", "I lost\na card"]),
        ("1.Why?\n2.How?", ["Why?", "How?"]),
        ("1. first\n\n   its second paragraph\n2. other", ["first\nits second paragraph", "other"]),
        ("1. compute 2**3 and 4**5", ["compute 2**3 and 4**5"]),
        ("1. a list:\n   - inner\n2. b", ["a list:\n- inner", "b"]),
        ("Sure, here are two:\n\n1. one\n2. two", ["one", "two"]),
        ("1. one\n2.\n3. three", ["one", "three"]),
    ],
)
def test_lists_as_models_write_them(text: str, expected: list[str]) -> None:
    parsed = parse(text, "numbered")
    assert (inputs(parsed), parsed.leftovers, parsed.cut) == (expected, (), "")


def test_stray_lines_behind_a_list_are_leftovers() -> None:
    parsed = parse("1. one\n2. two\n\nI hope that this helps!\nTell me.", "numbered")
    assert inputs(parsed) == ["one", "two"]
    assert parsed.leftovers == ("I hope that this helps!\nTell me.",)


def test_a_list_that_was_cut_loses_its_last_item_and_no_other() -> None:
    parsed = parse("5. Why was it declined?\n6. My card is", "numbered", cut=True)
    assert (inputs(parsed), parsed.leftovers, parsed.cut) == (["Why was it declined?"], (), "My card is")
    assert parse("5. Why was it declined?\n", "numbered", cut=True).cut == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('Sure!\n```json\n["a", "b"]\n```\nEnjoy [1].', ["a", "b"]),
        ('{"items": ["a", "b"]}', ["a", "b"]),
        ('{"1": "a", "2": "b"}', ["a", "b"]),
        ('{"example 1": "a", "example 2": "b"}', ["a", "b"]),
        ('[{"text": "a"} {"text": "b"}]', ["a", "b"]),
        ('[\n"""\n{"text": "a"}\n]', ["a"]),
        ('["a", "b",]', ["a", "b"]),
        ('[{"text": "a",}, {"text": "b",},]', ["a", "b"]),
        ('{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ('{"messages": [{"text": "a"}, {"text": "b"}]}', ["a", "b"]),
        ('["two\nlines"]', ["two\nlines"]),
        ("[]", []),
        ("no JSON [at all] {here}", []),
    ],
)
def test_json_as_models_write_it(text: str, expected: list[str]) -> None:
    parsed = parse(text, "json")
    assert (inputs(parsed), parsed.leftovers, parsed.cut) == (expected, (), "")


def test_json_pairs_by_any_of_their_usual_names() -> None:
    text = (
        '[{"Question": "2+2?", "Answer": 4}, {"instruction": "Add.", "input": "1, 1", "output": "2"}, {"prompt": "p", "completion": "c"}]'
    )
    assert parse(text, "json").items == (Item("2+2?", "4"), Item("Add.\n\n1, 1", "2"), Item("p", "c"))


@pytest.mark.parametrize(
    ("text", "expected", "broken"),
    [
        ('["one", "two", "thr', ["one", "two"], '"thr'),
        ('```json\n[{"text": "one"}, {"text": "tw', ["one"], '{"text": "tw'),
        ('{"items": ["one", "two", "th', ["one", "two"], '"th'),
        ('{"items": [{"text": "one"}, {"te', ["one"], '{"te'),
    ],
)
def test_whole_elements_are_saved_from_json_that_was_cut(text: str, expected: list[str], broken: str) -> None:
    parsed = parse(text, "json", cut=True)
    assert (inputs(parsed), parsed.cut) == (expected, broken)
    assert parse(text, "json").leftovers == (broken,), "not cut, so it is broken"


def test_elements_that_are_no_items_are_leftovers() -> None:
    parsed = parse('["one", 2, {"colour": "red"}, ""]', "json")
    assert (inputs(parsed), parsed.leftovers) == (["one"], ("2", '{"colour": "red"}'))


def test_half_a_surrogate_can_be_written_as_utf8() -> None:
    (item,) = parse(r'["smile \ud83d!"]', "json").items
    assert item.input.encode() == "smile \ufffd!".encode()


def test_blocks_of_pairs() -> None:
    text = "Input: What is 6 x 7?\nOutput: Six sevens.\nAnswer: 42\n---\n#### 42\n\nExample 6\nInput: And 2 x 2?\nOutput:\n4\n\nExample 7\n"
    assert parse(text, "blocks").items == (Item("What is 6 x 7?", "Six sevens.\nAnswer: 42\n---\n#### 42"), Item("And 2 x 2?", "4"))


def test_empty_lines_within_a_value_stay() -> None:
    gap = "a" + "\n" * 5_000 + "b"
    assert parse(f"Text: {gap}\n\n---\nText: c", "blocks").items == (Item(gap), Item("c"))


def test_blocks_in_markdown_and_cut() -> None:
    text = "**Question 1:** Why?\n**Answer 1:** Because.\n\n**Question 2:** How?\n**Answer 2:** By wa"
    parsed = parse(text, "blocks", cut=True)
    assert (parsed.items, parsed.cut) == ((Item("Why?", "Because."),), "How?\nBy wa")


def test_a_pair_without_its_output_is_a_leftover() -> None:
    parsed = parse("Input: a\nOutput: b\n\nInput: c\n", "blocks")
    assert (parsed.items, parsed.leftovers) == ((Item("a", "b"),), ("Input: c",))


@pytest.mark.parametrize(
    ("prompt", "answer", "how", "expected"),
    [
        ("1. a\n2. b\n3.", " Why not?\n4. c", "numbered", ["Why not?", "c"]),
        ("1. a\n2. My", " card is gone", "numbered", ["My card is gone"]),
        ('- "a"\n- "', "Why not?", "numbered", ["Why not?"]),
        ("Original: a\nReworded:", " it is an a", "blocks", []),
        ("Original: a\nReworded: It", " is an a", "text", ["It is an a"]),
        ("Write one.\n\nText:", " Once upon\n\na time.", "text", ["Once upon\n\na time."]),
        ("A story begins.\n", "Once: a time.", "text", ["Once: a time."]),
    ],
)
def test_a_completion_goes_on_with_the_last_line_of_its_prompt(prompt: str, answer: str, how: str, expected: list[str]) -> None:
    parsed = parse(continued(prompt, answer, how), how)  # type: ignore[arg-type]
    assert inputs(parsed) == (expected or ["it is an a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("Here:\n- a\n- b", ["a", "b"]),
        ("1. a", ["a"]),
        ('Here is one: {"text": "a"}', ["a"]),
        ("```\nOne poem.\n```", ["One poem."]),
        ("A story - long ago -\nof two lines.", ["A story - long ago -\nof two lines."]),
        ('1. Parse {"text": "a"}.\n2. b', ['Parse {"text": "a"}.', "b"]),
    ],
)
def test_auto_sees_the_shape(text: str, expected: list[str]) -> None:
    assert inputs(parse(text)) == expected


anything = st.one_of(
    st.text(),
    st.text(alphabet='[]{}",:\\ \n1.-ab`*', max_size=80),
    st.lists(st.sampled_from(["Input:", "Output:", "1. a", "\n", "[", '"', "{", "Example 2", "```json", " ", "\ud800"])).map("".join),
)


@given(anything, st.sampled_from(["numbered", "json", "blocks", "text", "auto"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_no_text_raises_and_every_item_can_be_stored(text: str, how: str, cut: bool) -> None:
    for item in parse(text, how, cut=cut).items:  # type: ignore[arg-type]
        assert item.input == item.input.strip() != ""
        (item.input + (item.output or "")).encode()


def test_deep_nesting_does_not_raise() -> None:
    assert parse("[" * 1_500, "json").items == ()
    assert parse('{"a":' * 1_500, "auto").items == (Item('{"a":' * 1_500),)


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s == s.strip() != "")
lines = st.text(alphabet=st.characters(categories=["L", "N"], include_characters=" ,?!'-"), min_size=1).filter(
    lambda s: s == s.strip(" '") and s[0].isalpha()
)


@given(st.lists(texts, min_size=1), st.booleans())
@settings(deadline=None)
def test_well_formed_json_is_read_to_the_letter(items: list[str], fenced: bool) -> None:
    written = json.dumps(items)
    assert inputs(parse(f"Here:\n```json\n{written}\n```" if fenced else written, "json")) == items


@given(st.lists(st.tuples(texts, texts), min_size=1))
@settings(deadline=None)
def test_well_formed_pairs_are_read_to_the_letter(pairs: list[tuple[str, str]]) -> None:
    written = json.dumps([{"input": i, "output": o} for i, o in pairs], indent=2)
    assert parse(written).items == tuple(Item(i, o) for i, o in pairs)


@given(st.lists(lines, min_size=1), st.integers(1, 50), st.sampled_from(["{}. {}", "{}) {}", '{}. "{}"', "**{}.** {}"]))
@settings(deadline=None)
def test_well_formed_lists_are_read_to_the_letter(items: list[str], start: int, form: str) -> None:
    written = "\n".join(form.format(start + i, item) for i, item in enumerate(items))
    assert inputs(parse(written, "numbered")) == items


@given(st.lists(st.tuples(lines, lines), min_size=1))
@settings(deadline=None)
def test_well_formed_blocks_are_read_to_the_letter(pairs: list[tuple[str, str]]) -> None:
    written = "".join(f"Example {n}\nInput: {i}\nOutput: {o}\n\n" for n, (i, o) in enumerate(pairs))
    assert parse(written, "blocks").items == tuple(Item(i, o) for i, o in pairs)


@pytest.mark.parametrize(
    ("text", "items", "cut"),
    [
        ('[{"text": "a whole", "tags": ["q", "r', (), '{"text": "a whole", "tags": ["q", "r'),
        ('[{"input": "a", "output": "b"}, {"inp', (Item("a", "b"),), '{"inp'),
        ('```json\n["one?", "two?", "thr', (Item("one?"), Item("two?")), '"thr'),
    ],
)
def test_what_stands_inside_an_item_that_was_cut_is_none(text: str, items: tuple[Item, ...], cut: str) -> None:
    got = parse(text, "json", cut=True)
    assert (got.items, got.cut) == (items, cut)


def test_wherever_an_answer_is_cut_only_whole_items_are_read() -> None:
    rows = [{"input": f"I{n}", "output": {"input": f"x{n}", "output": ["a", {"text": "t"}], "b": n}} for n in range(3)]
    for text in (json.dumps({"items": rows}), json.dumps(rows), json.dumps(rows, indent=1), "Here:\n" + json.dumps(rows)):
        whole = parse(text, "json").items
        for end in range(len(text)):
            got = parse(text[:end], "json", cut=True).items
            assert got == whole[: len(got)]
