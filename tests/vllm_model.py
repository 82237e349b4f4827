"""Unpacks our default model from its GGUF into a folder of plain weights, which is what vLLM serves; runs in vLLM's environment."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from generators.teachers.models import DEFAULT_MODEL, find_model, missing_model


def main(folder: Path) -> None:
    gguf = find_model(DEFAULT_MODEL)
    if gguf is None:
        sys.exit(missing_model(DEFAULT_MODEL))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now: what still calls them quantised would make the next reader look for a GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    part = folder.with_suffix(".part")
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    part.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
