"""Which family a model is of, by its name alone: judges of one family tend to be wrong together, and a family shares its terms."""

from __future__ import annotations

import re

# How the names of a family begin, once the organisation before them is gone. The longest beginning decides: "gpt-oss" is not "gpt",
# which matters because its weights are open.
FAMILIES = {
    "aya": ("aya", "c4ai-aya"),
    "baichuan": ("baichuan",),
    "bloom": ("bloom", "bloomz"),
    "claude": ("claude",),
    "command": ("command", "c4ai-command"),
    "dbrx": ("dbrx",),
    "deepseek": ("deepseek",),
    "ernie": ("ernie",),
    "exaone": ("exaone",),
    "falcon": ("falcon",),
    "gemini": ("gemini",),
    "gemma": ("gemma", "codegemma", "medgemma", "shieldgemma"),
    "glm": ("glm", "chatglm"),
    "gpt": ("gpt", "chatgpt", "davinci", "text-davinci"),
    "gpt-j": ("gpt-j",),
    "gpt-neo": ("gpt-neo", "gpt-neox"),
    "gpt-oss": ("gpt-oss",),
    "gpt2": ("gpt2", "distilgpt2"),
    "granite": ("granite",),
    "grok": ("grok",),
    "hunyuan": ("hunyuan",),
    "internlm": ("internlm",),
    "jamba": ("jamba",),
    "kimi": ("kimi", "moonlight", "moonshot"),
    "lfm": ("lfm",),
    "llama": ("llama", "codellama", "meta-llama"),
    "minimax": ("minimax",),
    "mistral": ("mistral", "codestral", "devstral", "magistral", "ministral", "mixtral", "open-mistral", "open-mixtral", "pixtral"),
    "nemotron": ("nemotron",),
    "nova": ("nova", "amazon-nova"),
    "o-series": ("o1", "o3", "o4"),
    "olmo": ("olmo", "olmoe"),
    "phi": ("phi",),
    "pythia": ("pythia",),
    "qwen": ("qwen", "codeqwen", "qvq", "qwq"),
    "smollm": ("smollm",),
    "solar": ("solar",),
    "stablelm": ("stablelm",),
    "titan": ("titan", "amazon-titan"),
    "tinyllama": ("tinyllama",),
    "tulu": ("tulu",),
    "yi": ("yi",),
}
_FAMILY = {beginning: family for family, beginnings in FAMILIES.items() for beginning in beginnings}
# A name may go on with a version or a size ("qwen2.5", "phi3"), not with more of the word ("novasky" is not "nova").
_BEGINS = re.compile(rf"({'|'.join(sorted(map(re.escape, _FAMILY), key=len, reverse=True))})(?=[^a-z]|v?\d|$)")


def family_of(model: str) -> str:
    """The family of a model: "qwen" for "Qwen/Qwen2.5-7B-Instruct-Q4_K_M.gguf"; organisation, version, size and form don't count.

    A name is all that is read, so what was distilled into or trained on another model counts as what its name begins with.
    For a model of none of `FAMILIES` stands its name's first word, in lower case.
    """
    parts = [part for part in re.split(r"[/:@\\]+", model.strip().lower()) if part][::-1]  # the last is mostly the model
    for part in parts:
        words = part.split(".")
        for i in range(len(words)):  # "us.anthropic.claude-3-haiku"
            if found := _BEGINS.match(".".join(words[i:])):
                return _FAMILY[found[1]]
    first = (re.search(r"[^\W\d_]+", part) for part in parts)
    return next((word[0] for word in first if word), model.strip().lower())
