"""A run of its own for the test that kills it: asks 200 questions and writes a line for every answer that it was handed."""

import sys
from pathlib import Path

from factory.gateway import Gateway
from factory.ledger import Ledger
from generators.teachers.openai import OpenAI
from schemas.call import Call

ledger_file, url = sys.argv[1:]
teacher = OpenAI(model="m", base_url=url, concurrency=16)
calls = [Call(teacher="t", prompt=f"question {n}") for n in range(200)]
with Ledger.open(Path(ledger_file)) as ledger, Gateway({"t": teacher}, ledger, home=Path(), run="r", budget_micro_usd=None) as gateway:
    for answer in gateway.ask(calls, stage="s", round=1):
        assert answer.reply is not None
        print(answer.call.prompt, answer.reply.text, answer.fresh, sep="\t", flush=True)
