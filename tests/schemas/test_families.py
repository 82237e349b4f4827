"""Names as they stand in recipes, on hubs, at servers and on disk, each with the family that a person would give it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("gpt-4o-mini", "gpt"),
        ("openai/gpt-4.1", "gpt"),
        ("ft:gpt-4o-mini-2024-07-18:my-org::abc", "gpt"),
        ("openai/gpt-oss-20b", "gpt-oss"),
        ("openai-community/gpt2-xl", "gpt2"),
        ("o3-mini", "o-series"),
        ("o1", "o-series"),
        ("claude-3-5-sonnet-20241022", "claude"),
        ("us.anthropic.claude-3-haiku-20240307-v1:0", "claude"),
        ("models/gemini-1.5-pro", "gemini"),
        ("google/gemma-2-9b-it", "gemma"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama"),
        ("Meta-Llama-3-8B-Instruct.Q4_K_M.gguf", "llama"),
        ("accounts/fireworks/models/llama-v3p1-8b-instruct", "llama"),
        ("/models/llama-3.2-1b/model.gguf", "llama"),
        ("llama3", "llama"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama"),
        ("TheBloke/Mixtral-8x7B-Instruct-v0.1-GGUF", "mistral"),
        ("ministral-8b", "mistral"),
        ("qwen3:8b", "qwen"),
        ("bartowski/Qwen2.5-7B-Instruct-GGUF:Qwen2.5-7B-Instruct-Q4_K_M.gguf", "qwen"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi"),
        ("phi4", "phi"),
        ("smollm2-135m-instruct", "smollm"),
        ("SmolLM2-135M-Instruct.Q4_1@b179c9523d0e6a0f", "smollm"),
        ("allenai/OLMoE-1B-7B", "olmo"),
        ("ibm-granite/granite-3.1-8b-instruct", "granite"),
        ("CohereForAI/c4ai-command-r-v01", "command"),
        ("org/name-7b-instruct-q4.gguf", "name"),
        ("novasky-t1", "novasky"),
        ("Fake", "fake"),
        ("123", "123"),
        ("", ""),
    ],
)
def test_a_name_tells_the_family(model: str, family: str) -> None:
    assert family_of(model) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_version_size_form_and_organisation_do_not_count(family: str) -> None:
    for beginning in FAMILIES[family]:
        for name in (beginning, f"Org/{beginning.upper()}-7B-Instruct", f"{beginning}-2.5-q4_k_m.gguf", f"/models/{beginning}:latest"):
            assert family_of(name) == family


@given(st.text())
def test_every_name_has_a_family_and_it_is_lower_case(model: str) -> None:
    assert family_of(model) == family_of(model).lower()
