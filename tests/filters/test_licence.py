"""Whose words a student may learn from: the terms that are known, those that are not, and the student's own family."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS
from factory.terms import _known, terms_of
from filters.licence import Licence
from schemas.families import FAMILIES
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame

MODELS = {
    "open": "Qwen/Qwen2.5-7B-Instruct",
    "small": "Qwen/Qwen2.5-0.5B-Instruct",
    "api": "gpt-4o-mini",
    "old": "meta-llama/Meta-Llama-3-8B-Instruct",
    "new": "meta-llama/Llama-3.1-8B-Instruct",
    "own": "our-own-model",
}


def row(teacher: str | None) -> Sample:
    return chat(f"by {teacher}", "ok", teacher=teacher, origin="made" if teacher else "real")


def judged(
    *teachers: str | None, models: dict[str, str] = MODELS, **settings: Any
) -> dict[str | None, tuple[bool, str | None, dict[str, Any]]]:
    samples = [row(teacher) for teacher in teachers]
    verdicts = Licence(**settings).judge(frame(*samples), FakeContext(models=models))
    assert verdicts.schema == VERDICTS
    found = {v["sample"]: (v["keep"], v["reason"], json.loads(v["detail"])) for v in verdicts.iter_rows(named=True)}
    return {teacher: found[sample.id] for teacher, sample in zip(teachers, samples, strict=True)}


def reasons(**settings: Any) -> dict[str | None, str | None]:
    return {teacher: reason for teacher, (_, reason, _) in judged(*MODELS, None, **settings).items()}


def test_what_terms_forbid_falls_and_real_rows_stay() -> None:
    assert reasons() == {**dict.fromkeys([*MODELS, None]), "old": "training on output: no"}
    strict = reasons(forbid=("no", "conditions", "unknown"))
    assert strict == {
        "open": None,
        "small": None,
        "api": "training on output: conditions",
        "old": "training on output: no",
        "new": "training on output: conditions",
        "own": "training on output: unknown",
        None: None,
    }
    assert set(reasons(forbid=()).values()) == {None}


def test_a_student_never_learns_from_its_own_family() -> None:
    kin = "of the student's family"
    assert reasons(student="Qwen/Qwen3-0.6B", forbid=()) == {**dict.fromkeys([*MODELS, None]), "open": kin, "small": kin}
    exact = reasons(student="qwen2.5-0.5b-instruct", collapse="model", forbid=())
    assert exact == {**dict.fromkeys([*MODELS, None]), "small": "by the student itself"}
    assert set(reasons(student="Qwen/Qwen3-0.6B", collapse="off", forbid=()).values()) == {None}
    assert reasons(student="Qwen/Qwen3-0.6B", allow=("open",), forbid=())["open"] == kin  # a contract mends no collapse


def test_ones_own_contract_is_let_through() -> None:
    assert reasons(allow=("old",))["old"] is None
    assert reasons(allow=("Llama 2 (3) Community License",))["old"] is None
    assert reasons(forbid=("unknown",), licences={"own": "ours"}, allow=("ours",))["own"] is None
    (_, _, detail) = judged("own", licences={"own": "ours"})["own"]
    assert detail == {"teacher": "own", "model": "our-own-model", "family": "our", "terms": "ours", "training": "unknown"}
    with pytest.raises(GristmillError, match="names 'opem', and the recipe has no such teacher; did you mean 'open'"):
        judged("open", licences={"opem": "x"})


def test_the_detail_says_what_is_known_and_where_it_stands() -> None:
    keep, _, detail = judged("api")["api"]
    assert keep
    assert detail == {
        "teacher": "api",
        "model": "gpt-4o-mini",
        "family": "gpt",
        "terms": "OpenAI Services Agreement",
        "training": "conditions",
        "note": "not for models that compete with OpenAI",
        "source": "https://openai.com/policies/services-agreement/",
    }


def test_a_teacher_of_another_recipe_is_unknown() -> None:
    assert judged("gone", forbid=("unknown",))["gone"][1] == "training on output: unknown"
    assert judged("gone", student="gone-7b")["gone"][:2] == (True, None)


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ("Llama-3.3-70B-Instruct", "conditions"),
        ("llama3.2:3b", "conditions"),
        ("llama3:8b", "no"),
        ("Llama-2-7b-chat-hf", "no"),
        ("codellama-34b", "no"),
        ("Llama-4-Scout-17B-16E", "conditions"),
        ("llama-7b", "unknown"),
        ("gpt-oss-20b", "yes"),
        ("Qwen2.5-72B-Instruct", "conditions"),
        ("qwen3-max", "unknown"),
        ("gemma-3-4b-it", "conditions"),
        ("DeepSeek-R1-Distill-Llama-8B", "conditions"),
        ("DeepSeek-R1", "yes"),
        ("mistral-large-latest", "unknown"),
        ("smollm2-135m-instruct", "yes"),
        ("fake", "unknown"),
    ],
)
def test_terms_are_known_by_the_models_name(model: str, training: str) -> None:
    assert terms_of(model).training == training


def test_every_entry_has_a_source_and_a_family_that_there_is() -> None:
    for entry in _known():
        assert entry.family in FAMILIES
        assert entry.terms and entry.source and entry.source.startswith("https://")
        assert entry.training != "unknown"
        assert entry.training != "conditions" or entry.note, "conditions are told"


def test_faulty_settings_are_refused() -> None:
    for settings in ({"forbid": ["yes"]}, {"collapse": "all"}, {"students": "x"}):
        with pytest.raises(ValidationError):
            Licence.model_validate(settings)
