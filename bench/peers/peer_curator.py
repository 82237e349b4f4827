"""bespokelabs-curator: an LLM called on a dataset of prompts, with the concurrency set and its cache off."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from measure import Watch, arguments, parsed, question

options = parsed(arguments(__doc__))
# It counts tokens with an encoding that is fetched from outside, unless it is found here; litellm, which it needs, carries it.
litellm = importlib.util.find_spec("litellm")
assert litellm and litellm.origin
os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers")

from bespokelabs import curator  # noqa: E402  (after the core is chosen)
from datasets import Dataset  # noqa: E402


class Asker(curator.LLM):
    """One prompt in, one text out."""

    def prompt(self, row: dict) -> str:
        return row["question"]

    def parse(self, row: dict, answer: str) -> dict:
        return {"question": row["question"], "answer": answer}


watch = Watch()
# It reads a server's limits from the headers of a first request; where there are none, its default is a few hundred calls a minute.
limits = {} if options.limited else {"max_requests_per_minute": 10_000_000, "max_tokens_per_minute": 10_000_000_000}
limits["max_concurrent_requests"] = options.concurrency
# What fails for good is left out, as its documentation advises; else the run ends with an error in place of rows.
asker = Asker(
    model_name=options.model,
    backend="openai",
    backend_params={"base_url": f"{options.url}/v1", "require_all_responses": False, **limits},
)
made = asker(Dataset.from_list([{"question": question(n)} for n in range(options.calls)]))
watch.report(len(made.dataset))
