"""Makes samples by few-shot prompts: real seeds as examples, axes of variation, many samples an answer, aimed at what is thin."""

from __future__ import annotations

import json
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jinja2
import polars as pl
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, field_validator, model_validator

from factory.errors import GristmillError
from factory.recipe import did_you_mean
from factory.stage import Context, Effort, Generator, Need, RecipeFile, TeacherNames
from factory.structured import schema_of
from generators.asking import DRAWS_A_ROUND, answered, calls_for, dealt, deck, in_turn, shares
from generators.parse import How, Item, Parsed, continued, parse
from schemas.call import Answer, Call, Params
from schemas.sample import Failure, Message, Provenance, Role, Sample

Form = Literal["chat", "completion"]
Task = Literal["label", "pairs", "text", "inputs"]
Value = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]

TEMPLATES = Path(__file__).parent / "templates"
NAMES = ("heading", "examples", "label", "label_description", "labels", "axes", "n", "start", "exemplars", "place", "tried")

# Of the shipped templates: how their answers are read, and where a completion ends when one item or several are asked for
# (None: it can be asked for one only).
_SHIPPED: Mapping[str, tuple[How, tuple[str, ...], tuple[str, ...] | None]] = {
    "label-chat": ("json", (), ()),
    "label-completion": ("numbered", ("\n",), ("\n{next}.", "\n\n")),
    "quoted-completion": ("numbered", ("\n", '"'), None),
    "opening-completion": ("numbered", ("\n",), None),
    "paraphrase-completion": ("blocks", ("\n",), None),
    "pairs-chat": ("json", (), ()),
    "pairs-completion": ("blocks", ("\nExample",), ("\nExample {next}",)),
    "text-chat": ("json", (), ()),
    "text-completion": ("blocks", ("\nExample",), ("\nExample {next}",)),
}


class Compose(Generator):
    """Shows a teacher some seeds and asks for more of their kind.

    What a seed is decides what is written. Label tasks (all seeds of a label have one output): the teacher writes inputs, and the
    output is that of the label aimed at. Others: pairs of input and output. Plain texts: texts.

    `template` is "auto" or the name of a shipped one; `template_file` one of your own (Jinja; `NAMES` are what it may use; lines
    `--- system`, `--- user`, `--- assistant` begin a turn of a chat). `form` and `parse` unset follow the template's name
    (`…-completion` or chat) and its answers. `about` says in some words what the samples are, and `labels` goes on from there for
    each label, or stands where `about` has "{}": "Messages from bank customers" + "who ask why a transfer failed". Several wordings
    of `about` take turns: a small model hangs on the heading.
    """

    key = "compose"

    teachers: Annotated[tuple[str, ...] | dict[str, Annotated[float, Field(gt=0)]], TeacherNames()] = Field(
        (), description="who is asked: names, in equal shares, or names with their weights; all of the recipe by default"
    )
    by: Literal["auto", "weight", "yield"] = Field(
        "auto",
        description="yield: from round 2 on, effort goes where good rows a dollar (or a call) are most; weight: in the proportions of "
        "teachers and share, whatever they yield; auto: yield, unless teachers have weights",
    )
    output_schema: Annotated[Path | None, RecipeFile()] = Field(
        None, description="what every output is to be: a JSON schema (.json, .yaml), or a .py file with a pydantic model"
    )
    output_model: str | None = Field(None, description="the model's class, where output_schema is a .py file")
    template: str = "auto"
    template_file: Annotated[Path | None, RecipeFile()] = None
    form: Form | None = None
    parse: How = "auto"
    about: str | tuple[str, ...] = ""
    labels: dict[str, str] = Field(default_factory=dict)
    axes: dict[str, tuple[Value, ...]] = Field(default_factory=dict, description="what to vary: name and values")
    examples: int = Field(4, ge=0, description="seeds shown in a prompt")
    per_call: int = Field(5, ge=1, description="samples asked for in a call")
    draws: int = Field(1, ge=1, description="answers asked for to one prompt; more let a server reuse what it has read")
    share: float = Field(
        1, gt=0, le=1, description="of what is missing; where several lines have more than all of it together, in proportion"
    )
    max_calls: int = Field(500, ge=1, description="in a round")
    show: Literal["seeds", "kept"] = Field("seeds", description="kept: made samples serve as examples too, at the risk of collapse")
    params: Params = Params()

    @field_validator("template")
    @classmethod
    def _known(cls, name: str) -> str:
        name = name.removesuffix(".j2")
        if name != "auto" and name not in _SHIPPED:
            known = ", ".join(_SHIPPED)
            raise ValueError(
                f"no template is called {name!r}{did_you_mean(name, _SHIPPED)}; there are {known}; one of your own: template_file"
            )
        return name

    @field_validator("axes")
    @classmethod
    def _varied(cls, axes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if empty := [name for name, values in axes.items() if not values]:
            raise ValueError(f"the axis {empty[0]!r} has no values")
        return axes

    @model_validator(mode="after")
    def _one_template(self) -> Compose:
        if self.template_file and self.template != "auto":
            raise ValueError("give template or template_file, not both")
        if self.form and self.template != "auto" and not self.template.endswith(self.form):
            raise ValueError(f"the template {self.template!r} is not of the form {self.form!r}")
        if self.template != "auto" and _SHIPPED[self.template][2] is None and self.per_call != 1:
            raise ValueError(f"the template {self.template!r} writes one sample a call: set per_call: 1")
        if self.template_file and self.template_file.is_file():  # a missing one is the loader's to report
            try:
                read_template(self.template_file)
            except GristmillError as error:
                raise ValueError(f"{error.where}: {error.what}") from error
        return self

    def effort(self, teachers: Sequence[str]) -> Effort:
        """Its share, divided by the weights of its teachers."""
        fixed = self.by == "weight" or (self.by == "auto" and isinstance(self.teachers, dict))
        return Effort(shares(self.teachers, teachers, self.share), fixed, self.per_call, self.axes, kinds=("chat", "text"))

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        """Ask, and yield what the answers hold; GristmillError, before anything is asked, where a template can't be filled in."""
        for question, answer in answered(self._questions(samples, ctx), ctx):
            yield from _read(question, answer)

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
        """The calls that `generate` would make."""
        return (question.call for question in self._questions(samples, ctx))

    def _questions(self, samples: pl.DataFrame, ctx: Context) -> list[_Question]:
        """All questions of this round, filled in; places take turns, so that all of them share what `max_calls` leaves."""
        if not (self.teachers or ctx.teachers):
            raise GristmillError("the recipe names no teachers", where=ctx.stage, next="Add one under teachers:.")
        seeds = _Seeds(ctx.seeds if self.show == "seeds" else samples.filter(~pl.col("holdout")), self.labels)
        path = self.template_file or TEMPLATES / f"{self._template_for(seeds.task)}.j2"
        wording = _Wording(read_template(path), self.form or ("completion" if path.stem.endswith("completion") else "chat"))
        schema = self._schema(seeds.task, wording.form, ctx)
        own = self.effort(ctx.teachers).shares
        owed: dict[str, float] = defaultdict(float)
        places = [
            self._prompts(need, seeds, samples, ctx, dealt(need.teachers or own, owed, ctx.rng)) for need in ctx.needs if need.missing > 0
        ]
        drawn: Counter[str] = Counter()
        questions = []
        for ref, prompt in enumerate(islice(in_turn(places), self.max_calls)):
            text = wording.fill(self._names(prompt, seeds))
            draw = ctx.round * DRAWS_A_ROUND + drawn[text]
            drawn[text] += 1  # by text and not by teacher: two names may stand for one model
            asked: dict[str, Any] = {"prompt": text} if wording.form == "completion" else {"messages": _turns(text)}
            params = self._params(prompt, seeds, path.stem)
            call = Call(teacher=prompt.teacher, params=params, json_schema=schema, draw=draw, ref=str(ref), aim=prompt.need.aim, **asked)
            where = Provenance(
                origin="made",
                generator=ctx.stage,
                round=ctx.round,
                parents=tuple(row["id"] for row in prompt.examples),
                teacher=prompt.teacher,
                template=path.stem,
                axes=prompt.axes,
            )
            system = _system(prompt.examples[0]) if prompt.examples else ""
            questions.append(_Question(call, seeds, self._how(path.stem), self.per_call, prompt.label, system, where))
        return questions

    def _schema(self, task: Task, form: Form, ctx: Context) -> dict[str, Any] | None:
        """The schema of a whole answer: a list of items whose outputs are as `output_schema` says."""
        if self.output_schema is None:
            return None
        if task != "pairs" or form != "chat":
            why = "output_schema is for outputs that a teacher writes in a chat"
            raise GristmillError(why, where=ctx.stage, next="Remove it, or bring seeds with outputs and use a chat template.")
        name = self.output_schema.name + (f":{self.output_model}" if self.output_model else "")
        output = dict(schema_of(name, self.output_schema.parent))
        shared = {"$defs": output.pop("$defs")} if "$defs" in output else {}  # references to them start at the root
        item = _object({"input": {"type": "string"}, "output": output})
        return _object({"items": {"type": "array", "items": item}}) | shared

    def _template_for(self, task: Task) -> str:
        return f"{'text' if task == 'inputs' else task}-{self.form or 'chat'}" if self.template == "auto" else self.template

    def _how(self, template: str) -> How:
        return self.parse if self.parse != "auto" or self.template_file else _SHIPPED[template][0]

    def _prompts(self, need: Need, seeds: _Seeds, samples: pl.DataFrame, ctx: Context, teachers: Iterator[str]) -> Iterator[_Prompt]:
        """What to show and ask for at one place, each prompt `draws` times; axes and teachers are balanced."""
        calls = calls_for(need, self.per_call)
        pool = seeds.at(need, samples, ctx)
        labels = deck([row["label"] for row in pool] or [need.label], ctx.rng)  # in the proportions of the real ones there
        axes = {name: deck(_open(name, values, need), ctx.rng) for name, values in self.axes.items()}
        exemplars = seeds.exemplars(need)
        tried = [{"text": each.text, "why": each.why} for each in need.tried]
        about = deck((self.about,) if isinstance(self.about, str) else self.about, ctx.rng)
        for first in range(0, calls, self.draws):
            label = next(labels)
            here = [row for row in pool if row["label"] == label]
            if len(here) < self.examples:  # a cluster may hold few of a label: others of the label fill up
                around = [row for row in seeds.rows if row["label"] == label and row not in here]
                here += ctx.rng.sample(around, min(self.examples - len(here), len(around)))
            examples = ctx.rng.sample(here, min(self.examples, len(here)))
            heading = self._heading(next(about), label)
            of_label = [row for row in exemplars if row["label"] == label]
            varied = {name: next(values) for name, values in axes.items()}
            prompt = _Prompt(next(teachers), label, heading, varied, examples, of_label, tried, need)
            yield from [prompt] * min(self.draws, calls - first)

    def _heading(self, about: str, label: str | None) -> str:
        """One line that says what the texts are."""
        if label is None:
            return about or "Examples"
        if "{}" in about:
            return about.replace("{}", self.labels.get(label, _plain(label)))
        if label in self.labels:
            return f"{about} {self.labels[label]}".strip()
        return f"{about} ({_plain(label)})" if about else f'Texts of the kind "{_plain(label)}"'

    def _names(self, prompt: _Prompt, seeds: _Seeds) -> dict[str, Any]:
        """What a template may use: exactly `NAMES`."""
        return {
            "heading": prompt.heading,
            "examples": [_shown(row) for row in prompt.examples],
            "label": prompt.label,
            "label_description": seeds.described.get(prompt.label or "", ""),
            "labels": seeds.described,
            "axes": prompt.axes,
            "n": self.per_call,
            "start": len(prompt.examples) + 1,
            "exemplars": [_shown(row) for row in prompt.exemplars],
            "place": prompt.need.name,
            "tried": prompt.tried,
        }

    def _params(self, prompt: _Prompt, seeds: _Seeds, template: str) -> Params:
        """The recipe's params, and where they are silent room for what is asked and the marks at which a completion ends."""
        filled: dict[str, Any] = {}
        if "max_tokens" not in self.params.model_fields_set:
            filled["max_tokens"] = seeds.room(self.per_call, prompt.examples)
        stop = () if self.params.stop or self.template_file else _SHIPPED[template][1 if self.per_call == 1 else 2] or ()
        if stop:
            filled["stop"] = tuple(mark.replace("{next}", str(len(prompt.examples) + 1 + self.per_call)) for mark in stop)
        return self.params.model_copy(update=filled)


@dataclass(frozen=True)
class _Prompt:
    """What one prompt shows, and what it asks for of whom."""

    teacher: str
    label: str | None
    heading: str
    axes: dict[str, str]
    examples: list[dict[str, Any]]
    exemplars: list[dict[str, Any]]
    tried: list[dict[str, str]]
    need: Need


@dataclass(frozen=True)
class _Question:
    """A call, and all that is needed to read its answer."""

    call: Call
    seeds: _Seeds
    how: How
    per_call: int
    label: str | None
    system: str
    where: Provenance


class _Seeds:
    """The samples that may be shown, as rows, and what kind of task they are."""

    def __init__(self, frame: pl.DataFrame, descriptions: Mapping[str, str]) -> None:
        self.rows = frame.select("id", "kind", "input", "output", "label", "messages").to_dicts()  # Jinja reads a row as a dict
        self.labels = list(dict.fromkeys(row["label"] for row in self.rows if row["label"] is not None))
        if other := [label for label in descriptions if label not in self.labels]:
            raise GristmillError(
                f"labels: describes {other[0]!r}, and no seed has that label{did_you_mean(other[0], self.labels)}",
                next=f"Labels of the seeds: {', '.join(self.labels) or 'none'}.",
            )
        self.described = {label: descriptions.get(label) or _plain(label) for label in self.labels}

    @cached_property
    def task(self) -> Task:
        """ "label" where the label decides the output; "text" for plain texts, "inputs" where nothing has an output, else "pairs"."""
        kinds = {row["kind"] == "text" for row in self.rows}
        if len(kinds) == 2:
            raise GristmillError("the seeds are plain texts and conversations mixed", next="Make two recipes of them.")
        if kinds == {True}:
            return "text"
        if not any(row["output"] for row in self.rows):
            return "inputs"
        one_each = len({(row["label"], row["output"]) for row in self.rows}) == len(self.labels)
        return "label" if one_each and all(row["label"] is not None for row in self.rows) else "pairs"

    @cached_property
    def outputs(self) -> dict[str | None, str]:
        """What a model is taught to say for each label of a label task."""
        return {row["label"]: row["output"] for row in self.rows}

    def room(self, n: int, shown: list[dict[str, Any]]) -> int:
        """Tokens for `n` items twice as long as the longest shown, at 3.5 bytes a token; at most 2,048: small contexts are common."""
        longest = max((len((row["input"] + (row["output"] if self.task == "pairs" else "")).encode()) for row in shown), default=500)
        return min(max(64, n * (16 + longest * 4 // 7)), 2048)

    def exemplars(self, need: Need) -> list[dict[str, Any]]:
        """The rows among a need's exemplars that may be shown."""
        return [row for row in self.rows if row["id"] in need.exemplars]

    def at(self, need: Need, samples: pl.DataFrame, ctx: Context) -> list[dict[str, Any]]:
        """The rows that show a thin place: those of its label; of a cluster its exemplars, else the four nearest to them.

        Exemplars may be made samples, which are not shown: real ones near them stand for the place.
        """
        apart = need.without.get("label", ())
        rows = [row for row in self.rows if row["label"] not in apart and (need.label is None or row["label"] == need.label)]
        if need.cluster is None:
            return rows
        among = [row for row in rows if row["id"] in need.exemplars]
        made = samples.filter(pl.col("id").is_in(need.exemplars))["input"].to_list()
        if among or not rows or not made:
            return among or rows
        nearness = ctx.embed([row["input"] for row in rows]) @ ctx.embed(made).mean(axis=0)
        return [rows[i] for i in (-nearness).argsort(kind="stable")[:4]]


def _open(name: str, values: Sequence[str], need: Need) -> Sequence[str]:
    """The values of an axis that a place leaves open: its own one, or those that have no place of their own."""
    if name in need.axes:
        return (need.axes[name],)
    return [value for value in values if value not in need.without.get(name, ())]


def _read(question: _Question, answer: Answer) -> Iterator[Sample | Failure]:
    """The samples of one answer, and a Failure for every piece of it that is none."""
    who = answer.teacher or answer.call.teacher
    lost = Failure(reason="unanswered", detail=answer.error or "", teacher=who, call=answer.key)
    if answer.reply is None:
        yield lost
        return
    written, prompt = answer.reply.text, answer.call.prompt
    if answer.reply.finish == "refused":
        yield lost.model_copy(update={"reason": "refused", "text": written})
        return
    how = question.how
    parsed = parse(continued(prompt, written, how) if prompt is not None else written, how, cut=answer.reply.finish == "length")
    for item in parsed.items:
        if wrong := _misfit(question, item):
            text = json.dumps({"input": item.input, "output": item.output}, ensure_ascii=False)
            yield lost.model_copy(update={"reason": wrong, "text": text})
        else:
            yield _sample(question, item, answer)
    for piece in parsed.leftovers:
        yield lost.model_copy(update={"reason": "not an item", "text": piece})
    if parsed.cut:
        yield lost.model_copy(update={"reason": "cut", "text": parsed.cut, "detail": f"reached max_tokens {answer.call.params.max_tokens}"})
    if parsed == Parsed():
        reason = "cut" if answer.reply.finish == "length" else "nothing parsed"
        yield lost.model_copy(update={"reason": reason, "text": written, "detail": f"read as {how}"})


def _misfit(question: _Question, item: Item) -> str | None:
    """Why an item is no sample of the task; None where it is one."""
    seeds, label = question.seeds, question.label
    if seeds.task == "pairs" and not item.output:
        return "no output"
    if (
        seeds.task == "label"
        and item.output not in (None, label, seeds.outputs[label])
        and item.output in {*seeds.labels, *seeds.outputs.values()}
    ):
        return "other label"
    return None


def _sample(question: _Question, item: Item, answer: Answer) -> Sample:
    seeds, label = question.seeds, question.label
    logprob = answer.reply.logprob if answer.reply and question.per_call == 1 else None  # of several items it says nothing of one
    who = answer.teacher or question.where.teacher  # another than was asked, where a fallback stood in
    where = question.where.model_copy(update={"call": answer.key, "logprob": logprob, "teacher": who})
    if seeds.task == "text":
        return Sample(text=item.input, label=label, provenance=where)
    output = {"label": seeds.outputs.get(label), "pairs": item.output}.get(seeds.task) or ""
    turns = [("system", question.system), ("user", item.input), ("assistant", output)]
    messages = tuple(Message(role=cast(Role, role), content=content) for role, content in turns if content)
    return Sample(messages=messages, label=label, provenance=where)


# What templates see of a row: without its system turn, which made samples take over as it is.


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    text = row["input"]
    if system := _system(row):
        text = text.removeprefix(f"system: {system}\n")
        text = text.removeprefix("user: ") if "\nassistant: " not in text else text
    return {"input": text, "output": row["output"], "label": row["label"]}


def _system(row: dict[str, Any]) -> str:
    turns = row["messages"]
    return str(turns[0]["content"]) if turns and turns[0]["role"] == "system" else ""


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _plain(label: str) -> str:
    return re.sub(r"[_\W]+", " ", label).strip()


# Templates

_TURN = re.compile(r"^--- (system|user|assistant)[ \t]*$", re.MULTILINE)
_MARK = "\ue000{}\ue000"  # stands for a turn's line while a template is filled in: a seed that holds such a line begins no turn


@dataclass(frozen=True)
class _Wording:
    """A template and the form of what it makes."""

    template: jinja2.Template
    form: Form

    def fill(self, names: dict[str, Any]) -> str:
        """The prompt; GristmillError with template and line where it can't be made."""
        try:
            return self.template.render(names)
        except Exception as error:  # whatever an expression of the user's raises, it is theirs to mend
            frames = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(frames) if frame.filename == self.template.filename), None)
            raise _mistake(str(error), self.template.filename, line) from error


def read_template(path: Path) -> jinja2.Template:
    """A template, checked: syntax, and every name that it may ever look up; GristmillError with file and line."""
    try:
        source = _TURN.sub(lambda turn: _MARK.format(turn[1]), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GristmillError(f"can't read this template: {error}", where=str(path)) from error
    env = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (source, str(path), None) if name == path.name else None),
    )
    env.filters |= {"tojson": lambda value: json.dumps(value, ensure_ascii=False), "line": lambda text: " ".join(str(text).split())}
    del env.filters["random"]  # it would ask other questions each time; axes vary, and are written down
    try:
        tree = env.parse(source)
        unknown = meta.find_undeclared_variables(tree) - set(NAMES) - set(env.globals)
        for node in tree.find_all(nodes.Name):
            if node.name in unknown and node.ctx == "load":
                raise _mistake(f"{node.name!r} is undefined{did_you_mean(node.name, NAMES)}", str(path), node.lineno)
        return env.get_template(path.name)
    except jinja2.TemplateSyntaxError as error:
        raise _mistake(error.message or "not a template", str(path), error.lineno) from error


def _mistake(what: str, file: str | None, line: int | None) -> GristmillError:
    return GristmillError(what, where=f"{file}:{line}" if line else str(file), next=f"A template may use: {', '.join(NAMES)}.")


def _turns(text: str) -> tuple[Message, ...]:
    """The turns of a filled-in chat template; what stands before the first `---` line is the user's."""
    parts = ["user", *re.split(_MARK.format("(system|user|assistant)"), text)]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(role=cast(Role, role), content=content.strip()) for role, content in turns if content.strip())
