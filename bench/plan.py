"""Whether a bill is what `plan --probe 20` said it would be: three recipes of different kinds, each probed, then really run.

    python bench/plan.py [--seeds 100 101 102 103 104] [--probe 20] [--only texts] [--teachers usual hard] [--json out.json]

The teachers are a server of ours, which speaks OpenAI's protocol and has a teacher's faults: answers of uneven length, lists that
are too short, prose in place of a list, favourites that come again and again, rows that are off the subject. How much of each
depends on the label, the teacher and the seed. A question that is asked again is answered anew. Every seed is another teacher
and another recipe; each has a home of its own, so that no ledger answers for another. `hard` teachers err so often that the
first round rarely suffices, and the bill hangs on what the later ones ask.

What the forecast believes beforehand was settled on seeds below 100, so the default ones are others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from aiohttp import web

from factory.ledger import open_ledger
from factory.plan import Plan, make_plan
from factory.recipe import load_recipe
from factory.run import run
from factory.store import write_json

ROOT = Path(__file__).resolve().parent.parent
DEV = ROOT / "bench" / "data" / "banking77_dev.jsonl"
SEEDS = ROOT / "examples" / "bank-intents" / "seeds.jsonl"
WITHIN = 0.15

INTENTS = """\
name: intents
seed: {seed}
target: {{accepted: 200, balance: label}}
teachers:
  small: {{kind: openai, model: small, base_url: {url}, provider: mock, concurrency: 8,
           price: {{input_usd_per_mtok: 0.15, output_usd_per_mtok: 0.6}}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{about: Messages from bank customers, per_call: 5, params: {{temperature: 1.0}}}}
  - rules: {{min_words: 4, forbid: ['(?i)\\b(order|parcel|refund)s?\\b']}}
  - exact: {{}}
  - near: {{threshold: 0.75}}
"""

PAIRS = """\
name: pairs
seed: {seed}
target: {{accepted: 150}}
teachers:
  writer: {{kind: openai, model: writer, base_url: {url}, provider: mock, concurrency: 8,
            price: {{input_usd_per_mtok: 0.15, output_usd_per_mtok: 0.6}}}}
  critic: {{kind: openai, model: critic, base_url: {url}, provider: mock, concurrency: 4,
            price: {{input_usd_per_mtok: 1.25, output_usd_per_mtok: 10}}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{about: Sums in words, teachers: [writer], per_call: 4, axes: {{setting: [school, kitchen, market, journey, garden]}}}}
  - rules: {{min_words: 5}}
  - near: {{threshold: 0.9}}
  - judge: {{rubric: correctness, teachers: [critic]}}
"""

TEXTS = """\
name: texts
seed: {seed}
target: {{accepted: 240}}
teachers:
  cheap: {{kind: openai, model: cheap, base_url: {url}, provider: mock, concurrency: 8,
           price: {{input_usd_per_mtok: 0.1, output_usd_per_mtok: 0.4}}}}
  dear: {{kind: openai, model: dear, base_url: {url}, provider: mock, concurrency: 8,
          price: {{input_usd_per_mtok: 2.5, output_usd_per_mtok: 10}}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{about: Reviews of a hotel, share: 0.5, per_call: 6, axes: {{guest: [family, clerk, couple], mood: [glad, cross]}}}}
  - compose: {{about: Letters to a hotel, share: 0.5, per_call: 3, examples: 2, axes: {{length: [a sentence, three sentences]}}}}
  - rules: {{min_words: 5, forbid: ['(?i)as an ai']}}
  - near: {{threshold: 0.8}}
"""


# From and to which share of the items each fault is drawn.
SHARES = {
    "usual": {
        "favourite": (0.02, 0.35),
        "off": (0.0, 0.35),
        "wrong": (0.1, 0.5),
        "cheap": ((0.1, 0.4), (0.05, 0.3)),
        "dear": ((0.0, 0.1), (0.0, 0.05)),
    },
    "hard": {
        "favourite": (0.02, 0.4),
        "off": (0.0, 0.45),
        "wrong": (0.25, 0.75),
        "cheap": ((0.2, 0.6), (0.1, 0.4)),
        "dear": ((0.0, 0.3), (0.0, 0.2)),
    },
}
Shares = dict[str, Any]


class Mock:
    """A teacher by question: `write` for each model makes the answer's text, given what is asked and a random source of its own."""

    def __init__(self, seed: int, write: dict[str, Callable[[str, random.Random], str]]) -> None:
        self.seed, self.write = seed, write
        self.asked: Counter[str] = Counter()

    def respond(self, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """The answer in OpenAI's shape, and the seconds that it takes."""
        asked = "\n".join(message["content"] for message in body["messages"])
        self.asked[asked] += 1
        rng = random.Random(f"{self.seed}/{body['model']}/{self.asked[asked]}/{asked}")
        text = self.write[body["model"]](asked, rng)
        most = body.get("max_tokens", 4096)
        tokens, finish = tokens_of(text), "stop"
        if tokens > most:
            text, tokens, finish = text[: most * 4], most, "length"
        message = {"role": "assistant", "content": text, "refusal": None}
        usage = {"prompt_tokens": tokens_of(asked) + 8, "completion_tokens": tokens, "total_tokens": tokens_of(asked) + 8 + tokens}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice], "usage": usage}
        return answer, rng.uniform(0.06, 0.15) + tokens * 0.0015


def tokens_of(text: str) -> int:
    """About as many as a tokenizer makes of English: words and marks, long words in pieces."""
    return sum(1 + len(word) // 8 for word in re.findall(r"\w+|[^\w\s]", text))


@contextmanager
def serving(mock: Mock) -> Iterator[str]:
    """The mock behind a port of this machine; gives its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def chat(request: web.Request) -> web.Response:
        answer, seconds = mock.respond(await request.json())
        await asyncio.sleep(seconds)
        return web.json_response(answer)

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, runner.addresses[0][1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def listed(items: list[Any], rng: random.Random, *, prose: float, short: float) -> str:
    """Items as a teacher lists them: now and then fewer than were asked for, or in prose that nobody can read."""
    if rng.random() < prose:
        return "Certainly! I thought about what such people might say, and they would write about their troubles. " * rng.randint(1, 4)
    if rng.random() < short:
        items = items[: rng.randint(1, max(1, len(items) - 1))]
    return json.dumps(items, ensure_ascii=False)


def wanted(asked: str) -> int:
    """How many items a prompt of ours asks for."""
    found = re.search(r"Write (\d+) new", asked)
    return int(found[1]) if found else 1


# A bank's intents


def intents(seed: int, folder: Path, shares: Shares) -> Mock:
    """Real development rows of the label, two sentences of which make a message. Some labels are far better than others."""
    (folder / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    rows: dict[str, list[str]] = {}
    for line in DEV.read_text().splitlines():
        question, label = (turn["content"] for turn in json.loads(line)["messages"])
        rows.setdefault(label.replace("_", " "), []).append(question)
    rng = random.Random(f"{seed}/labels")
    character = {
        label: (rng.uniform(*shares["favourite"]), rng.uniform(*shares["off"]), rng.uniform(0, 0.12), rng.uniform(0, 0.3)) for label in rows
    }

    def write(asked: str, rng: random.Random) -> str:
        label = next(found for found in re.findall(r"\(([^)]*)\):", asked) if found in rows)
        favourite, off, prose, short = character[label]
        items = []
        for _ in range(wanted(asked)):
            draw = rng.random()
            if draw < favourite:
                items.append(rows[label][rng.randrange(4)])
            elif draw < favourite + off:
                items.append(f"{rng.choice(rows[label])} Also my {rng.choice(['order', 'parcel', 'refund'])} is late.")
            else:
                items.append(" ".join(rng.sample(rows[label], rng.choice([2, 2, 3]))))
        return listed(items, rng, prose=prose, short=short)

    return Mock(seed, {"small": write})


# Sums in words, with a judge

NAMES = (
    "Ada",
    "Bo",
    "Cem",
    "Dora",
    "Emil",
    "Fay",
    "Gus",
    "Hana",
    "Ivo",
    "Jun",
    "Kira",
    "Leo",
    "Mia",
    "Noor",
    "Otto",
    "Pia",
    "Rosa",
    "Tess",
)
THINGS = ("apples", "pencils", "eggs", "tickets", "stones", "shells", "books", "coins", "ribbons", "buttons", "plums", "cards", "bricks")


def problem(rng: random.Random) -> tuple[str, str]:
    """A sum in words, and its solution in one to four steps."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    have, steps = rng.randint(2, 60), rng.randint(1, 4)
    told, worked = [f"{name} has {have} {thing}."], []
    for _ in range(steps):
        more = rng.randint(2, 40)
        told.append(
            rng.choice(
                [f"Then {rng.choice(NAMES)} brings {more} more.", f"At the {rng.choice(['market', 'fair', 'shop'])} {more} are added."]
            )
        )
        worked.append(f"{have} + {more} = {have + more}.")
        have += more
    return " ".join([*told, f"How many {thing} are there now?"]), " ".join([*worked, f"The answer is {have}."])


def pairs(seed: int, folder: Path, shares: Shares) -> Mock:
    """A writer that errs, by the setting, and a critic that is dear, wordy, and not always readable."""
    rng = random.Random(f"{seed}/pairs")
    made = [problem(rng) for _ in range(16)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in made]
    (folder / "seeds.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    wrong = {setting: rng.uniform(*shares["wrong"]) for setting in ("school", "kitchen", "market", "journey", "garden")}
    prose, short, harsh = rng.uniform(0, 0.1), rng.uniform(0, 0.3), rng.uniform(0.02, 0.15)

    def write(asked: str, rng: random.Random) -> str:
        setting = re.findall(r"Setting: (\w+)", asked)[-1]
        items = []
        for _ in range(wanted(asked)):
            question, answer = problem(rng)
            if rng.random() < wrong[setting]:
                answer = re.sub(r"\d+\.$", lambda found: f"{int(found[0][:-1]) + 1}.", answer)
            items.append({"input": question, "output": answer})
        return listed(items, rng, prose=prose, short=short)

    def criticise(asked: str, rng: random.Random) -> str:
        judged = asked[asked.rindex("The example to judge") :]
        question, answer = judged.split("Output:")[0], judged.split("Output:")[1]
        total = sum(int(n) for n in re.findall(r"\d+", question))
        right = f"The answer is {total}." in answer
        score = rng.choice([4, 5]) if right and rng.random() > harsh else rng.choice([1, 2, 3])
        evidence = f"The sum is {total}. " + "Each step was worked again and compared with the text. " * rng.randint(1, 5)
        return "I would rather not say." if rng.random() < 0.02 else json.dumps({"evidence": evidence, "score": score})

    return Mock(seed, {"writer": write, "critic": criticise})


# Letters to a hotel, by two teachers

SUBJECTS = ("room", "bed", "breakfast", "pool", "lift", "bar", "staff", "view", "bath", "garden", "porter", "bill")
VERDICTS = ("was far better than we hoped", "was cold", "was dirty", "made our week", "cost too much", "was loud at night", "had no light")
ASIDES = ("and nobody told us why", "though we asked twice", "so we will be back", "which our son loved", "after a long drive")


def texts(seed: int, folder: Path, shares: Shares) -> Mock:
    """A cheap teacher that hangs on its favourites and talks of itself, and a dear one that does so seldom."""
    rng = random.Random(f"{seed}/texts")

    def review(rng: random.Random) -> str:
        return " ".join(f"The {rng.choice(SUBJECTS)} {rng.choice(VERDICTS)} {rng.choice(ASIDES)}." for _ in range(rng.randint(1, 4)))

    (folder / "seeds.jsonl").write_text("\n".join(json.dumps({"text": review(rng)}) for _ in range(20)))
    favourites = [review(rng) for _ in range(6)]
    often = {name: tuple(rng.uniform(*bounds) for bounds in shares[name]) for name in ("cheap", "dear")}
    faults = {"cheap": (*often["cheap"], 0.1, 0.3), "dear": (*often["dear"], 0.02, 0.1)}

    def writer(name: str) -> Callable[[str, random.Random], str]:
        favourite, ai, prose, short = faults[name]

        def write(asked: str, rng: random.Random) -> str:
            items = []
            for _ in range(wanted(asked)):
                draw = rng.random()
                text = rng.choice(favourites) if draw < favourite else review(rng)
                items.append(f"As an AI I have no hotel. {text}" if 1 - draw < ai else text)
            return listed(items, rng, prose=prose, short=short)

        return write

    return Mock(seed, {name: writer(name) for name in faults})


RECIPES = {"intents": (INTENTS, intents), "pairs": (PAIRS, pairs), "texts": (TEXTS, texts)}


def once(name: str, kind: str, seed: int, n: int) -> dict[str, Any]:
    """Probe and run one recipe with teachers of one kind and seed; what was foreseen beside what came."""
    text, make = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / name
        task.mkdir()
        with serving(make(seed, task, SHARES[kind])) as url:
            (task / "recipe.yaml").write_text(text.format(seed=seed, url=url))
            recipe, home = load_recipe(task), Path(folder) / "mill"
            blind = make_plan(recipe, home)
            plan = make_plan(recipe, home, asking=n)
            status = run(recipe, home, view="quiet").status
        with open_ledger(home, read_only=True) as ledger:
            bill = ledger.spent(recipe.run_folder(home).name)
            calls = sum(entry.settled for entry in ledger.sums("run"))
    return {
        "recipe": name,
        "teachers": kind,
        "seed": seed,
        "status": status["status"],
        "rounds": status["rounds"],
        "probe_usd": (plan.probed.micro_usd or 0) / 1e6 if plan.probed else 0,
        "usd": compared(plan, "micro_usd", bill, 1e6),
        "calls": compared(plan, "calls", calls),
        "seconds": compared(plan, "seconds", status["seconds"]),
        "usd_without_a_probe": sum(e.micro_usd or 0 for e in blind.estimates) / 1e6,
    }


def compared(plan: Plan, what: str, came: float, unit: float = 1) -> dict[str, Any]:
    """An interval and what came of it, in dollars, calls or seconds."""
    low, middle, high = getattr(plan.forecast, what)
    figures = {"low": low / unit, "middle": middle / unit, "high": high / unit, "came": came / unit}
    return {**{k: round(v, 6) for k, v in figures.items()}, "inside": low <= came <= high, "error": round(came / middle - 1, 4)}


def main() -> None:
    """Run every recipe with every seed, print a line each, and write all with a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--probe", type=int, default=20)
    parser.add_argument("--only", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--teachers", choices=SHARES, nargs="+", default=list(SHARES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs, summary = [], {}
    for kind, name in product(options.teachers, options.only):
        these = []
        for seed in options.seeds:
            these.append(once(name, kind, seed, options.probe))
            print(line(these[-1]), flush=True)
        summary[f"{name}, {kind} teachers"] = summed(these)
        runs += these
    print(json.dumps(summary, indent=1))
    if options.json:
        write_json(options.json, {"probe": options.probe, "summary": summary, "runs": runs})


def line(run: dict[str, Any]) -> str:
    """One run as a line."""
    usd, calls, seconds = run["usd"], run["calls"], run["seconds"]
    return (
        f"{run['recipe']:<8}{run['teachers']:<6} seed {run['seed']}: ${usd['middle']:.4f} ({usd['low']:.4f} to {usd['high']:.4f}), "
        f"bill ${usd['came']:.4f} {usd['error']:+.1%} {'inside' if usd['inside'] else 'OUTSIDE'}; "
        f"calls {calls['middle']:.0f} ({calls['low']:.0f} to {calls['high']:.0f}), {calls['came']:.0f} made in {run['rounds']} rounds; "
        f"{seconds['middle']:.1f} s ({seconds['low']:.1f} to {seconds['high']:.1f}), took {seconds['came']:.1f}"
    )


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How one recipe's bills compare with what was foreseen."""
    errors = [abs(run["usd"]["error"]) for run in runs]
    blind = [abs(run["usd"]["came"] / run["usd_without_a_probe"] - 1) for run in runs]
    return {
        "runs": len(runs),
        "inside": sum(run["usd"]["inside"] for run in runs),
        "within_15_percent": sum(error <= WITHIN for error in errors),
        "mean_error": round(statistics.mean(errors), 4),
        "worst_error": max(errors),
        "mean_width": round(statistics.mean((run["usd"]["high"] - run["usd"]["low"]) / run["usd"]["middle"] for run in runs), 4),
        "mean_error_without_a_probe": round(statistics.mean(blind), 4),
        "calls_inside": sum(run["calls"]["inside"] for run in runs),
        "seconds_inside": sum(run["seconds"]["inside"] for run in runs),
    }


if __name__ == "__main__":
    main()
