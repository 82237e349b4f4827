"""distilabel: a pipeline of one TextGeneration task; its batch is its concurrency."""

from __future__ import annotations

import os

from measure import Watch, arguments, parsed, question

options = parsed(arguments(__doc__))

from distilabel.models.llms import OpenAILLM  # noqa: E402  (after the core is chosen)
from distilabel.pipeline import Pipeline  # noqa: E402
from distilabel.steps import LoadDataFromDicts  # noqa: E402
from distilabel.steps.tasks import TextGeneration  # noqa: E402

if __name__ == "__main__":  # its steps run in processes of their own
    watch = Watch()
    with Pipeline(name="bench", cache_dir=os.environ["PEER_FOLDER"]) as pipeline:
        rows = [{"instruction": question(n)} for n in range(options.calls)]
        load = LoadDataFromDicts(data=rows, batch_size=options.concurrency)
        llm = OpenAILLM(model=options.model, base_url=f"{options.url}/v1", api_key=os.environ["OPENAI_API_KEY"])
        ask = TextGeneration(llm=llm, input_batch_size=options.concurrency)
        load >> ask
    made = pipeline.run(use_cache=False)["default"]["train"]
    watch.report(sum(text is not None for text in made["generation"]))
