from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import failures_frame, samples_frame
from generators.seeds import Seeds, read_rows
from schemas.sample import Failure, Sample
from tests.context import FakeContext

BANK = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"


def written(folder: Path, content: str | bytes | list[Any], name: str = "seeds.jsonl") -> Path:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> tuple[list[Sample], list[Failure]]:
    rows = list(read_rows(path, **options))
    samples_frame(row for row in rows if isinstance(row, Sample))  # what came in must fit what is written to disk
    failures_frame(row for row in rows if isinstance(row, Failure))
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Failure)]


def grown(path: Path | None = None, **settings: Any) -> tuple[list[Sample], list[Failure], FakeContext]:
    ctx = FakeContext(stage="01-seeds", round=0)
    rows = list(Seeds(path=path, **settings).generate(ctx.seeds, ctx))
    return [row for row in rows if isinstance(row, Sample)], [row for row in rows if isinstance(row, Failure)], ctx


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


HELLO = [("user", "Hello"), ("assistant", "Hi")]

SHAPES = [
    ({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}, HELLO),
    ({"messages": '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'}, HELLO),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, {"role": "assistant", "content": "Hi"}]}, HELLO),
    (
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        HELLO,
    ),
    (
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "system": "Be kind"},
        [("system", "Be kind"), *HELLO],
    ),
    ({"instruction": "Hello", "input": "", "output": "Hi"}, HELLO),
    ({"instruction": "Add", "input": "1 and 2", "output": "3"}, [("user", "Add\n\n1 and 2"), ("assistant", "3")]),
    ({"instruction": "Hello", "response": "Hi"}, HELLO),
    ({"prompt": "Hello", "completion": "Hi"}, HELLO),
    ({"prompt": [{"role": "user", "content": "Hello"}], "completion": [{"role": "assistant", "content": "Hi"}]}, HELLO),
    ({"question": "Hello", "answer": "Hi"}, HELLO),
    ({"query": "Hello", "response": "Hi"}, HELLO),
    ({"input": "Hello", "output": "Hi"}, HELLO),
    ({"text": "Hello", "label": "Hi"}, HELLO),
    ({"text": "Hello", "category": "Hi", "messages": None}, HELLO),
    ({"text": "Hello", "intent": 3}, [("user", "Hello"), ("assistant", "3")]),
]


@pytest.mark.parametrize(("row", "expected"), SHAPES, ids=[f"{i}-{'-'.join(row)}" for i, (row, _) in enumerate(SHAPES)])
def test_rows_are_told_by_their_keys(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    [sample], failures = read(written(tmp_path, [row | {"difficulty": 4, "meta": {"topic": "greeting"}}]))
    assert turns(sample) == expected
    assert not failures
    assert {"difficulty": 4, "topic": "greeting"}.items() <= sample.meta.items()
    assert not sample.meta.keys() & {"messages", "conversations", "instruction", "prompt", "question", "text", "system"}
    assert sample.provenance.model_dump(exclude_defaults=True) == {"origin": "real", "generator": "seeds", "source": "seeds.jsonl:1"}


def test_plain_texts(tmp_path: Path) -> None:
    samples, _ = read(written(tmp_path, [{"text": "The tide comes in."}, "The tide goes out."]))
    assert [sample.text for sample in samples] == ["The tide comes in.", "The tide goes out."]
    samples, _ = read(written(tmp_path, "One a line.\r\n\r\nTwo lines.", "texts.txt"))
    assert [(sample.text, sample.provenance.source) for sample in samples] == [
        ("One a line.", "texts.txt:1"),
        ("Two lines.", "texts.txt:3"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello", "chosen": "Hi", "rejected": "Go"},
        {"prompt": [{"role": "user", "content": "Hello"}], "chosen": [{"role": "assistant", "content": "Hi"}], "rejected": "Go"},
        {  # as UltraFeedback has it: the prompt stands in both lists as well, and beside them `messages`
            "prompt": "Hello",
            "chosen": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
            "rejected": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Go"}],
            "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        },
        {
            "chosen": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
            "rejected": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Go"}],
        },
    ],
    ids=["texts", "turns", "both", "implicit"],
)
def test_preferences(tmp_path: Path, row: dict[str, Any]) -> None:
    [sample], failures = read(written(tmp_path, [row]))
    assert sample.kind == "preference"
    assert turns(sample) == [("user", "Hello")]
    assert [message.content for message in (*sample.chosen, *sample.rejected)] == ["Hi", "Go"]
    assert not failures


BROKEN = [
    ('{"question": "a", "answer": ', "unreadable line", "Expecting value"),
    ("not json", "unreadable line", "Expecting value"),
    ('{"question": "a", "answer": "\\ud83d"}', "unreadable line", "surrogate"),
    (b'{"question": "caf\xe9", "answer": "b"}', "unreadable line", "not UTF-8"),
    ('{"question": "a", "answer": ' + "9" * 5000 + "}", "unreadable line", "limit"),
    ("[" * 100_000, "unreadable line", "recursion"),
    ("42", "unrecognised row", "int"),
    ("[1, 2]", "unrecognised row", "list"),
    ("null", "unrecognised row", "NoneType"),
    ("{}", "unrecognised row", "none"),
    ('{"sentence": "a", "sentiment": "b"}', "unrecognised row", "sentence, sentiment"),
    ('{"question": "a"}', "unrecognised row", "question"),
    ('{"question": "a", "answer": 4}', "unrecognised row", "answer is a int"),
    ('{"messages": "Hello"}', "unrecognised row", "not a list of turns"),
    ('{"messages": [{"role": "robot", "content": "a"}]}', "unrecognised row", "robot"),
    ('{"messages": [{"role": "user", "content": null}]}', "unrecognised row", "NoneType"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]}',
        "unrecognised row",
        "turn 2",
    ),
    ('{"messages": []}', "empty", "no turns"),
    ('{"messages": [{"role": "user", "content": " "}]}', "empty", "without words"),
    ('{"question": "a", "answer": "  "}', "empty", "answer"),
    ('{"text": "\\n"}', "empty", "no words"),
    ('{"chosen": "a", "rejected": "b"}', "unrecognised row", "without a prompt"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "no preference", "the same"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BROKEN, ids=[f"{i}-{row[1]}" for i, row in enumerate(BROKEN)])
def test_a_broken_line_is_reported_with_its_number_and_the_others_are_read(
    tmp_path: Path, line: str | bytes, reason: str, detail: str
) -> None:
    good = b'{"question": "How far?", "answer": "%d miles"}\r\n'
    text = b"\xef\xbb\xbf" + good % 1 + b"\r\n" + (line if isinstance(line, bytes) else line.encode()) + b"\r\n" + good % 2
    samples, [failure] = read(written(tmp_path, text))
    assert [sample.output for sample in samples] == ["1 miles", "2 miles"]
    assert [sample.provenance.source for sample in samples] == ["seeds.jsonl:1", "seeds.jsonl:4"]
    assert (failure.reason, failure.source) == (reason, "seeds.jsonl:3")
    assert detail in failure.detail
    assert failure.text
    assert len(failure.text) <= 500


def test_a_repeat_names_both_lines(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}, {"instruction": "a", "output": "b", "note": "other keys"}]
    samples, [failure] = read(written(tmp_path, rows))
    assert len(samples) == 2
    assert (failure.reason, failure.detail) == ("repeat", "seeds.jsonl:3 repeats seeds.jsonl:1")


ROWS = [{"question": "a\nb", "answer": "c, d"}, {"question": 'e "f"', "answer": "g\u2028h"}]


@pytest.mark.parametrize("name", ["seeds.jsonl", "seeds.json"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n]",
        json.dumps({"version": 1, "data": ROWS}),
        json.dumps({"version": 1, "data": ROWS}, indent=4),
        "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ],
    ids=["array", "indented", "lines in brackets", "wrapped", "wrapped and indented", "lines"],
)
def test_json_is_read_in_every_usual_form(tmp_path: Path, name: str, text: str) -> None:
    samples, failures = read(written(tmp_path, text, name))
    assert [(sample.input, sample.output) for sample in samples] == [("a\nb", "c, d"), ('e "f"', "g\u2028h")]
    assert not failures


def test_an_array_goes_on_after_a_broken_item(tmp_path: Path) -> None:
    text = '[\n  {"question": "a", "answer": "b"},\n  {"question": "c", answer: "d"},\n  {"question": "e", "answer": "f"}\n'
    samples, failures = read(written(tmp_path, text, "seeds.json"))
    assert [(sample.input, sample.provenance.source) for sample in samples] == [("a", "seeds.json:2"), ("e", "seeds.json:4")]
    assert [(failure.source, failure.reason) for failure in failures] == [
        ("seeds.json:3", "unreadable line"),
        ("seeds.json:5", "unreadable line"),
    ]
    assert "no end" in failures[1].detail


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], "tags": ["a"]}
    [sample], _ = read(written(tmp_path, json.dumps(row), "seed.json"))
    assert turns(sample) == HELLO
    [sample], _ = read(written(tmp_path, json.dumps({"question": "a", "answer": "b"}, indent=1), "seed.json"))
    assert sample.output == "b"


def test_csv_keeps_quoted_lines_and_numbers_them(tmp_path: Path) -> None:
    text = (
        '\ufefftext,category\r\n"Where is\r\nmy card?",card\r\n\r\nToo,many,cells\r\n"Why, then?",fee\r\n"never closed,fee\r\nlost,fee\r\n'
    )
    samples, failures = read(written(tmp_path, text, "seeds.csv"))
    assert [(sample.input, sample.output, sample.provenance.source) for sample in samples] == [
        ("Where is\r\nmy card?", "card", "seeds.csv:2"),
        ("Why, then?", "fee", "seeds.csv:6"),
    ]
    assert [(failure.reason, failure.source) for failure in failures] == [
        ("unreadable line", "seeds.csv:5"),
        ("unreadable line", "seeds.csv:7"),
    ]
    assert "3 cells under 2 names" in failures[0].detail


def test_other_tables(tmp_path: Path) -> None:
    expected = [("a, b", "c"), ("d", "e")]
    tables = {"seeds.tsv": "question\tanswer\na, b\tc\nd\te\n", "seeds.csv": "question;answer\na, b;c\nd;e\n"}
    for name, text in tables.items():
        assert [(s.input, s.output) for s in read(written(tmp_path, text, name))[0]] == expected
    assert [(s.input, s.output) for s in read(written(tmp_path, tables["seeds.csv"].encode("utf-16"), "seeds.csv"))[0]] == expected
    samples, [failure] = read(written(tmp_path, b"question,answer\na,b\n" + b"caf\xe9,c\n", "seeds.csv"))
    assert len(samples) == 1
    assert failure.source == "seeds.csv:3"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "seeds.parquet"
    hello = [{"role": role, "content": content} for role, content in HELLO]
    pl.DataFrame({"messages": [hello, None, []], "text": [None, "The tide", None], "share": [float("nan"), 1.0, None]}).write_parquet(path)
    samples, [failure] = read(path)
    assert [sample.kind for sample in samples] == ["chat", "text"]
    assert samples[0].meta == {"share": None}
    assert (failure.source, failure.reason) == ("seeds.parquet:3", "empty")


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["card", "fee"])})
    part = datasets.Dataset.from_dict({"text": ["Where is it?", "Why pay?"], "label": [0, 1]}, features=features)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(str(tmp_path / "parts"))
    samples, _ = read(tmp_path / "one")
    assert [(sample.input, sample.output) for sample in samples] == [("Where is it?", "card"), ("Why pay?", "fee")]
    assert [sample.output for sample in read(tmp_path / "parts", split="test")[0]] == ["fee"]
    with pytest.raises(GristmillError, match="without a part 'dev'"):
        read(tmp_path / "parts", split="dev")
    (tmp_path / "other").mkdir()
    with pytest.raises(GristmillError, match="other"):
        read(tmp_path / "other")


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder for a name as well, so this needs no hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "faq").mkdir()
    written(tmp_path / "faq", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)], "train.jsonl")
    samples, _, _ = grown(dataset=str(tmp_path / "faq"), limit=3)
    assert [sample.output for sample in samples] == ["a0", "a1", "a2"]
    with pytest.raises(GristmillError) as caught:
        grown(dataset=str(tmp_path / "none"))
    assert "none" in caught.value.where
    assert "split" in caught.value.next


def test_odd_values_reach_the_disk(tmp_path: Path) -> None:
    text = '{"question": "a", "answer": "b", "n": NaN, "far": [Infinity, {"x": -Infinity}], "big": %s, "when": null}\n' % ("9" * 400)
    [sample], _ = read(written(tmp_path, text))
    assert sample.meta == {"n": None, "far": [None, {"x": None}], "big": int("9" * 400)}
    assert json.loads(samples_frame([sample])["meta"][0], parse_constant=pytest.fail) == sample.meta


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = written(tmp_path, [{"frage": "a", "data": {"antwort": "b"}, "id": 7}])
    assert [failure.reason for failure in read(path)[1]] == ["unrecognised row"]
    [sample], _ = read(path, columns={"question": "frage", "answer": "data.antwort"})
    assert (sample.input, sample.output, sample.meta["id"]) == ("a", "b", 7)
    assert "frage" not in sample.meta
    with pytest.raises(ValidationError, match="columns renames to qestion"):
        Seeds(path=path, columns={"qestion": "frage"})


def test_labels_are_the_answers_if_they_repeat_else_a_column(tmp_path: Path) -> None:
    few = [{"question": f"q{i}", "answer": "yes it is" if i % 2 else "no"} for i in range(4)]
    assert [s.label for s in grown(written(tmp_path, few))[0]] == ["no", "yes it is"] * 2
    varied = [{"question": f"q{i}", "answer": f"answer {i}", "intent": f"intent {i % 2}"} for i in range(4)]
    assert [s.label for s in grown(written(tmp_path, varied))[0]] == ["intent 0", "intent 1"] * 2
    plain = [{"question": f"q{i}", "answer": "a long answer that goes on and on"} for i in range(4)]
    assert {s.label for s in grown(written(tmp_path, plain))[0]} == {None}
    nested = [row | {"meta": {"topic": i}} for i, row in enumerate(plain)]
    for name in ("meta.topic", "topic"):
        assert [s.label for s in grown(written(tmp_path, nested), label=name)[0]] == ["0", "1", "2", "3"]
    assert {s.label for s in grown(written(tmp_path, plain), label="output")[0]} == {"a long answer that goes on and on"}
    assert {s.label for s in grown(written(tmp_path, few), label=None)[0]} == {None}
    with pytest.raises(GristmillError, match="no row has the label column 'subject'") as caught:
        grown(written(tmp_path, nested), label="subject")
    assert "topic" in caught.value.next


def test_a_text_is_answered_by_the_label_that_the_recipe_names(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "Where is it?", "kind": "card", "label": "x"}, {"text": "Why pay?", "kind": "fee", "label": "y"}])
    assert [(s.output, s.label) for s in grown(path, label="kind")[0]] == [("card", "card"), ("fee", "fee")]
    assert [(s.kind, s.label) for s in grown(path, label=None)[0]] == [("text", None)] * 2
    assert [(s.output, s.label) for s in grown(path)[0]] == [("x", "x"), ("y", "y")]  # too varied for classes, but a label column


def test_bank_seeds() -> None:
    samples, failures, ctx = grown(BANK)
    assert len(samples) == 40
    assert not failures
    assert set(ctx.reports["labels"].values()) == {4}
    assert len(ctx.reports["labels"]) == 10
    assert samples[0].provenance.generator == "01-seeds"
    assert samples[0].meta["intent"] == samples[0].label == samples[0].output
    assert not any(sample.holdout for sample in samples)


@pytest.mark.parametrize(("holdout", "a_label"), [(10, {1}), (0.25, {1}), (20, {2}), (0.1, {0, 1}), (15, {1, 2}), (30, {3})])
def test_holdout_is_spread_over_the_labels(holdout: float, a_label: set[int]) -> None:
    samples, _, _ = grown(BANK, holdout=holdout)
    aside = Counter(sample.label for sample in samples if sample.holdout)
    assert sum(aside.values()) == (holdout if holdout >= 1 else holdout * 40)
    assert {aside[sample.label] for sample in samples} == a_label


def test_holdout_is_by_content_and_hardly_moves(tmp_path: Path) -> None:
    lines = BANK.read_text().splitlines()
    aside = {sample.id for sample in grown(BANK, holdout=10)[0] if sample.holdout}
    shuffled = written(tmp_path, "\n".join(reversed(lines)))
    assert {sample.id for sample in grown(shuffled, holdout=10)[0] if sample.holdout} == aside
    for i in range(10):
        new = json.dumps({"messages": [{"role": "user", "content": f"It broke {i}"}, {"role": "assistant", "content": "failed_transfer"}]})
        longer = written(tmp_path, "\n".join([*lines, new]))
        moved = {sample.id for sample in grown(longer, holdout=10)[0] if sample.holdout} ^ aside
        labels = {sample.label for sample in grown(longer)[0] if sample.id in moved}
        assert labels <= {"failed_transfer"}


def test_a_teacher_must_be_shown_something() -> None:
    with pytest.raises(GristmillError, match="can't set 31 of 40 seeds aside") as caught:
        grown(BANK, holdout=31)
    assert "30" in caught.value.next
    with pytest.raises(ValidationError, match="share below 1"):
        Seeds(path=BANK, holdout=1.5)


def test_limit_counts_usable_rows(tmp_path: Path) -> None:
    path = written(tmp_path, ["a text", 42, "another", "a third"])
    samples, failures, _ = grown(path, limit=2)
    assert [sample.text for sample in samples] == ["a text", "another"]
    assert [failure.source for failure in failures] == ["seeds.jsonl:2"]


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["seeds.jsonl", "seeds.csv", "seeds.txt"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(GristmillError, match="no rows") as caught:
        grown(written(tmp_path, content, name))
    assert name in caught.value.where
    assert "messages" in caught.value.next


def test_a_file_of_nothing_usable_names_the_first_fault(tmp_path: Path) -> None:
    with pytest.raises(
        GristmillError, match=r"none of its 2 rows can be used; first, seeds.jsonl:1: unrecognised row \(its keys are wrong\)"
    ):
        grown(written(tmp_path, [{"wrong": 1}, {"wrong": 2}]))


@pytest.mark.parametrize("name", ["seeds.parquet", "seeds.xlsx", "seeds"])
def test_a_file_that_is_none_of_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(GristmillError) as caught:
        grown(written(tmp_path, "what is this?", name))
    assert name in caught.value.where
    assert caught.value.next


def test_one_place_is_needed(tmp_path: Path) -> None:
    for settings in ({}, {"path": BANK, "dataset": "org/name"}):
        with pytest.raises(ValidationError, match="either `path`"):
            Seeds(**settings)
    with pytest.raises(GristmillError, match="can't be read"):
        grown(tmp_path / "missing.jsonl")
