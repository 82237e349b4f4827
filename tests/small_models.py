"""Tiny models of transformers' own kinds, made from a seed and saved like any other; and the project's real one, opened once."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from generators.teachers.models import DEFAULT_MODEL, find_model, missing_model

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


@cache
def folder() -> Path:
    place = Path(tempfile.mkdtemp(prefix="small-models-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _tokenizer(template: str | None, pad: bool) -> Any:
    """Reads bytes, so that any text has its tokens: 256 of them, and those that mark turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    reader = Tokenizer(models.BPE(vocab=letters, merges=[]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, bos_token="<s>", eos_token="<end>", pad_token="<pad>" if pad else None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>"]})
    tokenizer.chat_template = template
    return tokenizer


@cache
def made(
    kind: str, *, labels: tuple[str, ...] = ("score",), template: str | None = TEMPLATE, pad: bool = True, headless: bool = False
) -> str:
    """The folder of a tiny Llama with random weights: kind "causal" or "classifier". headless: a classifier's head is not saved."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

    tokenizer = _tokenizer(template, pad)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        initializer_range=0.5,  # large, so that texts get scores that differ
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = {"causal": LlamaForCausalLM, "classifier": LlamaModel if headless else LlamaForSequenceClassification}[kind](config)
    place = folder() / f"{kind}-{abs(hash((labels, template, pad, headless)))}"
    model.save_pretrained(place)  # writes a bar to stderr, which pytest keeps
    tokenizer.save_pretrained(place)
    return str(place)


def needed() -> str | None:
    """Why the real model can't be opened here; None: it can."""
    if find_model(DEFAULT_MODEL) is None:
        return missing_model(DEFAULT_MODEL)
    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        return f"transformers opens a GGUF by {' and '.join(missing)}: pip install {' '.join(missing)}"
    return None


@contextmanager
def real_model() -> Iterator[dict[str, Any]]:
    """The settings by which a filter opens the project's own model; opened once a process, and asked by one thread.

    Two threads on two cores that others use as well wait for each other: four times as long, by the clock, as one.
    """
    if trouble := needed():
        pytest.skip(trouble)
    import gguf
    import torch

    path = find_model(DEFAULT_MODEL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # transformers reads the file four times, and the tokens in it take seconds each.
        with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
            yield {"model": str(path), "dtype": "float32"}
    finally:
        torch.set_num_threads(threads)
