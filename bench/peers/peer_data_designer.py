"""NeMo Data Designer: a seed column of prompts and one text column, with the concurrency set."""

from __future__ import annotations

import os

from measure import Watch, arguments, parsed, question

options = parsed(arguments(__doc__))

import data_designer.config as dd  # noqa: E402  (after the core is chosen)
import pandas as pd  # noqa: E402
from data_designer.interface import DataDesigner  # noqa: E402

watch = Watch()
provider = dd.ModelProvider(name="bench", endpoint=f"{options.url}/v1", provider_type="openai", api_key=os.environ["OPENAI_API_KEY"])
settings = dd.ChatCompletionInferenceParams(max_parallel_requests=options.concurrency)
model = dd.ModelConfig(alias="asked", model=options.model, provider="bench", inference_parameters=settings, skip_health_check=True)
builder = dd.DataDesignerConfigBuilder(model_configs=[model])
builder.with_seed_dataset(dd.DataFrameSeedSource(df=pd.DataFrame({"question": [question(n) for n in range(options.calls)]})))
builder.add_column(dd.LLMTextColumnConfig(name="answer", model_alias="asked", prompt="{{ question }}"))
designer = DataDesigner(artifact_path=os.environ["PEER_FOLDER"], model_providers=[provider])
# A model that fails now and then must not end the run; the port is for its own metrics.
designer.set_run_config(dd.RunConfig(disable_early_shutdown=True, otel_metrics_port=None))
made = designer.create(builder, num_records=options.calls, dataset_name="bench").load_dataset()
watch.report(int(made["answer"].notna().sum()))
