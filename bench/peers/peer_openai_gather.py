"""asyncio.gather over the official client, as its own documentation and most scripts have it; a semaphore bounds the calls."""

from __future__ import annotations

import asyncio
import os

from measure import Watch, arguments, parsed, question

options = parsed(arguments(__doc__))

from openai import AsyncOpenAI  # noqa: E402  (after the core is chosen)


async def ask_all() -> int:
    """How many of the questions got an answer."""
    slots = asyncio.Semaphore(options.concurrency)
    async with AsyncOpenAI(base_url=f"{options.url}/v1", api_key=os.environ["OPENAI_API_KEY"]) as client:

        async def ask(n: int) -> str | None:
            async with slots:
                messages = [{"role": "user", "content": question(n)}]
                answer = await client.chat.completions.create(model=options.model, messages=messages)
                return answer.choices[0].message.content

        answers = await asyncio.gather(*(ask(n) for n in range(options.calls)), return_exceptions=True)
    return sum(isinstance(answer, str) for answer in answers)


watch = Watch()
watch.report(asyncio.run(ask_all()))
