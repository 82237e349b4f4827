"""Reads a recipe and says everything that is wrong with it at once, with line numbers, before a cent is spent."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from factory import plugins
from factory.cells import CLUSTER, GIVEN, LABEL
from factory.errors import GristmillError, Problem, RecipeError
from factory.stage import Effort, Filter, Generator, RecipeFile, Stage, TeacherNames
from factory.teacher import Teacher
from schemas.canonical import canonical_json
from schemas.recipe import EmbedderChoice, ReleasePlan, Target
from schemas.watch import Watch

RECIPE_FILE = "recipe.yaml"

# What is not the identity of a run: a change here goes on in the same folder. Nor are `watch`, which only stops it, and `release`.
NOT_IDENTITY = {
    "target": {"budget_usd": "more money goes on where less stopped", "rounds": "so do more rounds"},
    "teachers": {
        "concurrency": "changes the speed, not the answers",
        "timeout_s": "as above",
        "retries": "as above",
        "price": "changes the bill, not the answers",
        "licence": "is written down, not asked",
        "threads": "as above",
        "api_key_env": "who pays, not what is answered",
        "limits": "changes the speed, not the answers",
        "mode": "live or batch: changes the bill and the hours, not the answers",
        "batch_size": "as above",
        "poll_s": "changes the speed, not the answers",
        "fallback": "stands in for a time; each sample says who wrote it",
        "structured": "how a schema is told to the server; what it asks for is the same",
        "python": "which interpreter starts the server, not what it serves",
        "command": "as above",
        "environment": "as above",
        "in_process": "as above",
        "start_timeout_s": "changes the speed, not the answers",
        "latency_ms": "as above",
    },
}

_TOP = {
    "name": "what the dataset is called",
    "seed": "random seed",
    "target": "what is wanted",
    "watch": "when a collapsing dataset is to stop the run",
    "embedder": "which model makes vectors",
    "teachers": "who is asked",
    "stages": "what is done",
    "release": "how a version is cut",
}

Where = tuple[str | int, ...]


@dataclass(frozen=True)
class StageLine:
    """One line of a recipe: its stage, and the folder of its output (item n is `0n-key`)."""

    folder: str
    stage: Stage


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be run: every part validated, every path absolute."""

    path: Path
    text: str
    name: str
    target: Target
    teachers: Mapping[str, Teacher]
    stages: tuple[StageLine, ...]
    embedder: EmbedderChoice = EmbedderChoice()
    release: ReleasePlan = ReleasePlan()
    watch: Watch = Watch()
    seed: int = 0

    @cached_property
    def digest(self) -> str:
        """Eight hex digits over all that changes what a run makes: parts, stages, and the bytes of the files that they name."""
        paths = {str(path) for _, path in self._files()}
        stages = [[line.stage.key, _without_paths(line.stage.model_dump(mode="json"), paths)] for line in self.stages]
        identity: dict[str, Any] = {
            "name": self.name,
            "seed": self.seed,
            "target": self.target.model_dump(mode="json", exclude=set(NOT_IDENTITY["target"])),
            "embedder": self.embedder.model_dump(mode="json"),
            "teachers": self.writers,
            "stages": stages,
            "files": self.hashes,
        }
        if self.target.reference:
            identity["target"]["reference"] = _sha256(self.target.reference)
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:8]

    @cached_property
    def writers(self) -> dict[str, Any]:
        """What decides the answers of each teacher."""
        return {
            name: [teacher.kind, teacher.model_dump(mode="json", exclude=_not_identity(teacher))] for name, teacher in self.teachers.items()
        }

    @cached_property
    def efforts(self) -> dict[str, Effort]:
        """How each generator's line would share out the work."""
        return {
            line.folder: line.stage.effort(tuple(self.teachers))
            for line in self.stages
            if isinstance(line.stage, Generator) and not line.stage.once
        }

    @cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Every axis that a generator varies, and all of its values."""
        found: dict[str, dict[str, None]] = {}
        for effort in self.efforts.values():
            for name, values in effort.axes.items():
                found.setdefault(name, {}).update(dict.fromkeys(values))
        return {name: tuple(values) for name, values in found.items()}

    def run_folder(self, home: Path) -> Path:
        """Where this recipe's run lives."""
        return home / "runs" / f"{self.name}-{self.digest}"

    def changed(self, folder: str) -> list[Path]:
        """Files of the stage with this folder that no longer are as the digest has them."""
        mine = [(field, path) for field, path in self._files() if field.startswith(f"{folder}.")]
        return [path for field, path in mine if not path.exists() or _sha256(path) != self.hashes[field]]

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The hash of every file that a stage names, by `folder.field`."""
        return {field: _sha256(path) for field, path in self._files()}

    def _files(self) -> list[tuple[str, Path]]:
        return [
            (f"{line.folder}.{name}" + (f".{number}" if number else ""), path)
            for line in self.stages
            for name in _marked(type(line.stage), RecipeFile)
            for number, path in enumerate(_paths(_value(line.stage, name)))
        ]


def _not_identity(teacher: Teacher) -> set[str]:
    """Settings of this teacher that change its answers as little as those of `NOT_IDENTITY`, or that only bear such a name."""
    names = set(NOT_IDENTITY["teachers"])
    if teacher.batching() is None:
        names.discard("mode")  # of `fake` it is how it makes its answers up
    if getattr(teacher, "provider", None):
        names.add("base_url")  # an address is only a way to whom `provider` names; without that it stands for who answers
    return names


def find_recipe(where: Path) -> Path:
    """The recipe's file: `where` itself, or `recipe.yaml` in that folder."""
    path = where / RECIPE_FILE if where.is_dir() else where
    if not path.is_file():
        raise GristmillError(
            "there is no recipe here",
            where=str(path),
            next=f"Name a recipe or its folder; `gristmill init {where}` writes one to start from.",
        )
    return path


def load_recipe(where: Path, *, asking: bool = True) -> Recipe:
    """Read and check a recipe; RecipeError carries every problem that was found.

    `asking`: what stands in the way of asking (a missing key, a model that was not fetched) is a problem too.
    """
    path = find_recipe(where)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(f"not UTF-8: {error}", str(path))]) from error
    except OSError as error:
        raise RecipeError([Problem(f"can't be read: {error.strerror}", str(path))]) from error
    return read_recipe(path, text, asking=asking)


def read_recipe(path: Path, text: str, *, asking: bool = True) -> Recipe:
    """As `load_recipe`, of a text that stands, or could stand, in the file at `path`."""
    return _Reading(path, text, asking).recipe()


class RecipeLoader(yaml.SafeLoader):
    """YAML in which only true and false are true and false, as in YAML 1.2: `off:` is a key, and `[Yes, No]` are words."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Reading:
    """One pass over a recipe's text, which gathers problems as it goes."""

    def __init__(self, path: Path, text: str, asking: bool) -> None:
        self.path, self.text, self.asking = path, text, asking
        self.problems: list[Problem] = []
        self.lines: dict[Where, int] = {}

    def recipe(self) -> Recipe:
        data = self._parse()
        self._unknown_keys(data, _TOP, ())
        name = data.get("name", self.path.resolve().parent.name)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            self._problem(("name",), f"name {name!r} must be lower-case letters, digits, '.', '_' and '-': it becomes a folder")
        seed = data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self._problem(("seed",), "seed is a whole number")
        if "target" not in data:
            self._problem((), "target is missing: say how many rows are wanted, e.g. target: {accepted: 200}")
        target = self._part(Target, self._with_reference(data.get("target", {"accepted": 1})), ("target",))
        embedder = self._part(EmbedderChoice, data.get("embedder", {}), ("embedder",))
        release = self._part(ReleasePlan, data.get("release", {}), ("release",))
        watch = self._part(Watch, data.get("watch", {}), ("watch",))
        teachers = self._teachers(data.get("teachers", {}))
        named = data.get("teachers")
        stages = self._stages(data.get("stages"), list(named) if isinstance(named, dict) else [])
        self._fallbacks(teachers)
        self._money(target, teachers)
        self._dimensions(target, [line.stage for line in stages])
        if self.problems:
            raise RecipeError(sorted(self.problems, key=lambda problem: problem.line or 0))
        assert target and embedder and release and watch
        return Recipe(self.path, self.text, name, target, teachers, stages, embedder, release, watch, seed)

    def _parse(self) -> dict[str, Any]:
        try:
            node = yaml.compose(self.text, Loader=RecipeLoader)
            if node is None:
                raise RecipeError([Problem("the recipe is empty", str(self.path))])
            self._locate(node, ())
            data = yaml.load(self.text, Loader=RecipeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise RecipeError(
                [Problem(f"not YAML: {error.problem or error.context}", str(self.path), mark.line + 1 if mark else None)]
            ) from error
        except yaml.YAMLError as error:
            raise RecipeError([Problem(f"not YAML: {error}", str(self.path))]) from error
        if not isinstance(data, dict):
            raise RecipeError([Problem("a recipe is a mapping with the keys " + ", ".join(_TOP), str(self.path), 1)])
        return data

    def _locate(self, node: yaml.Node, where: Where, seen: frozenset[int] = frozenset()) -> None:
        """Note the line of every value, and report keys that stand twice (YAML would keep the last and say nothing)."""
        self.lines.setdefault(where, node.start_mark.line + 1)
        if id(node) in seen:
            raise RecipeError([Problem("an alias that contains itself", str(self.path), node.start_mark.line + 1)])
        seen |= {id(node)}
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                inner = (*where, str(key.value))
                if str(key.value) in keys:
                    self.problems.append(Problem(f"the key {key.value!r} stands twice", str(self.path), key.start_mark.line + 1))
                keys.add(str(key.value))
                self.lines[inner] = key.start_mark.line + 1
                self._locate(value, inner, seen)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._locate(value, (*where, i), seen)

    def _problem(self, where: Where, message: str) -> None:
        while where and where not in self.lines:
            where = where[:-1]
        self.problems.append(Problem(message, str(self.path), self.lines.get(where)))

    def _unknown_keys(self, data: Mapping[str, Any], known: Iterable[str], where: Where) -> None:
        for key in data:
            if key not in known:
                self._problem((*where, str(key)), f"unknown key {key!r}{did_you_mean(str(key), known)}")

    def _part(self, model: type[BaseModel], value: Any, where: Where) -> Any:
        """`value` as a `model`, or None with the problems noted."""
        if value is None:
            value = {}
        if not isinstance(value, dict):
            known = ", ".join(model.model_fields) or "none"
            self._problem(where, f"{where[-1]} takes keys and values ({known}), not {value!r}")
            return None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            for detail in error.errors():
                self._problem((*where, *detail["loc"]), _sentence(detail, where, model))
            return None

    def _teachers(self, value: Any) -> dict[str, Teacher]:
        teachers: dict[str, Teacher] = {}
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self._problem(("teachers",), "teachers are names with settings, e.g. small: {kind: local, model: smollm2-135m-instruct}")
            return teachers
        for name, settings in value.items():
            where: Where = ("teachers", str(name))
            if not isinstance(settings, dict) or "kind" not in settings:
                self._problem(where, f"teacher {name!r} has no kind; kinds: {', '.join(plugins.names(plugins.TEACHERS))}")
                continue
            kind = settings["kind"]
            try:
                model = plugins.teacher_class(str(kind))
            except KeyError:
                known = plugins.names(plugins.TEACHERS)
                self._problem(
                    (*where, "kind"), f"unknown kind of teacher {kind!r}{did_you_mean(str(kind), known)}; kinds: {', '.join(known)}"
                )
                continue
            except GristmillError as error:
                self._problem((*where, "kind"), error.what)
                continue
            teacher = self._part(model, {key: v for key, v in settings.items() if key != "kind"}, where)
            if teacher is not None:
                teachers[str(name)] = teacher
                if self.asking and (trouble := teacher.check()):
                    self._problem(where, f"teacher {name!r}: {trouble}")
        return teachers

    def _stages(self, value: Any, teachers: Sequence[str]) -> tuple[StageLine, ...]:
        lines: list[StageLine] = []
        if not isinstance(value, list) or not value:
            self._problem(("stages",), "stages is a list, one `- key: {settings}` a line, that starts with `- seeds:`")
            return ()
        for i, item in enumerate(value):
            where: Where = ("stages", i)
            if isinstance(item, str):
                item = {item: {}}
            if not isinstance(item, dict) or len(item) != 1:
                self._problem(where, "a stage is one key with its settings, e.g. `- near: {threshold: 0.8}`")
                continue
            key, settings = next(iter(item.items()))
            try:
                model = plugins.stage_class(str(key))
            except KeyError:
                known = plugins.names(plugins.STAGES)
                self._problem((*where, str(key)), f"unknown stage {key!r}{did_you_mean(str(key), known)}; stages: {', '.join(known)}")
                continue
            except GristmillError as error:
                self._problem((*where, str(key)), error.what)
                continue
            stage = self._part(model, self._absolute(model, settings), (*where, str(key)))
            if stage is not None:
                self._check_marks(stage, (*where, str(key)), teachers)
                lines.append(StageLine(f"{i + 1:02d}-{key}", stage))
        if lines and not any(isinstance(line.stage, Generator) and line.stage.once for line in lines):
            self._problem(("stages",), "no stage brings seeds in: start with `- seeds: {path: seeds.jsonl}`")
        if len(lines) == len(value) and not any(isinstance(line.stage, Generator) and not line.stage.once for line in lines):
            self._problem(("stages",), "no stage makes samples: add one, e.g. `- compose: {}`")
        return tuple(lines)

    def _absolute(self, model: type[Stage], settings: Any) -> Any:
        """Settings with the paths of the recipe's files made absolute: they are relative to the recipe."""
        if not isinstance(settings, dict):
            return settings
        marked = _marked(model, RecipeFile)

        def absolute(value: Any, name: str) -> Any:
            if isinstance(value, list):
                return [absolute(one, name) for one in value]
            if isinstance(value, dict):
                return {key: absolute(inner, f"{name}.{key}") for key, inner in value.items()}
            return self.path.resolve().parent / Path(value).expanduser() if name in marked and isinstance(value, str) else value

        return {key: absolute(value, str(key)) for key, value in settings.items()}

    def _check_marks(self, stage: Stage, where: Where, teachers: Sequence[str]) -> None:
        for name, mark in _marked(type(stage), RecipeFile).items():
            for path in _paths(_value(stage, name)):
                if not mark.must_exist or path.exists():
                    continue
                near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
                self._problem((*where, *name.split(".")), f"there is no file {path}{did_you_mean(path.name, near)}")
        for name in _marked(type(stage), TeacherNames):
            for teacher in _value(stage, name) or ():
                if teacher not in teachers:
                    self._problem((*where, name), f"no teacher is called {teacher!r}{did_you_mean(teacher, teachers)}")
            if not teachers:
                self._problem(where, f"{where[-1]} asks a model, but the recipe names no teachers")

    def _fallbacks(self, teachers: Mapping[str, Teacher]) -> None:
        for name, teacher in teachers.items():
            others = [other for other in teachers if other != name]
            if teacher.fallback is not None and teacher.fallback not in others:
                near = did_you_mean(teacher.fallback, others)
                self._problem(("teachers", name, "fallback"), f"no other teacher is called {teacher.fallback!r}{near}")

    def _with_reference(self, value: Any) -> Any:
        """A target whose reference is an absolute path; a file that is not there is a problem."""
        if not (isinstance(value, dict) and isinstance(value.get("reference"), str)):
            return value
        path = self.path.resolve().parent / Path(value["reference"]).expanduser()
        if not path.exists():
            near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
            self._problem(("target", "reference"), f"there is no file {path}{did_you_mean(path.name, near)}")
        return {**value, "reference": path}

    def _dimensions(self, target: Target | None, stages: Sequence[Stage]) -> None:
        """What a target is by must be something that rows differ in."""
        if target is None:
            return
        axes = {name for stage in stages if isinstance(stage, Generator) for name in stage.effort(()).axes}
        known = [LABEL, CLUSTER, *GIVEN, *sorted(axes)]
        for key, names in (("balance", target.balanced), ("quotas", tuple(target.quotas))):
            for name in names:
                if name not in known:
                    there = ", ".join(known)
                    self._problem(("target", key), f"nothing differs in {name!r}{did_you_mean(name, known)}; there are {there}")
        if CLUSTER in target.balanced and not any(isinstance(stage, Filter) and stage.scope == "pool" for stage in stages):
            self._problem(("target",), "a target by cluster needs a stage that finds clusters: add `- coverage: {}` as the last one")

    def _money(self, target: Target | None, teachers: Mapping[str, Teacher]) -> None:
        if target is None or target.budget_usd is None:
            return
        for name, teacher in teachers.items():
            if teacher.known_price() is None:
                self._problem(
                    ("teachers", name),
                    f"the price of teacher {name!r} is unknown, so the budget can't be kept: "
                    "add price: {input_usd_per_mtok: …, output_usd_per_mtok: …}, or remove budget_usd",
                )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(detail: ErrorDetails, where: Where, model: type[BaseModel]) -> str:
    """A pydantic error in a recipe's words."""
    inner = [str(part) for part in detail["loc"]]
    key = ".".join([str(where[-1]), *inner])
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        return f"unknown key {inner[-1]!r} in {where[-1]}{did_you_mean(inner[-1], known)}; keys: {', '.join(known) or 'none'}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}" + ("" if detail["type"] == "value_error" else f" (got {detail['input']!r})")


def _fields_at(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    for part in loc:
        inner = model.model_fields.get(str(part))
        if inner is None or not (isinstance(inner.annotation, type) and issubclass(inner.annotation, BaseModel)):
            return []
        model = inner.annotation
    return list(model.model_fields)


def _marked(model: type[BaseModel], mark: type[Any]) -> dict[str, Any]:
    """The fields of a model whose annotation carries such a mark; "output.schema_file" is one of a model in it."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        for one in field.metadata:
            if isinstance(one, mark):
                found[name] = one
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= {f"{name}.{inner}": m for inner, m in _marked(field.annotation, mark).items()}
    return found


def _value(stage: Stage, name: str) -> Any:
    """The value of a field by its name as `_marked` gives it."""
    value: Any = stage
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _paths(value: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _sha256(path: Path) -> str:
    """The hash of a file's bytes; of a folder: of its files' names and hashes."""
    if path.is_dir():
        files = {str(p.relative_to(path)): _sha256(p) for p in path.rglob("*") if p.is_file()}
        return hashlib.sha256(canonical_json(files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_paths(settings: dict[str, Any], paths: set[str]) -> dict[str, Any]:
    """Settings without absolute paths: a moved folder is the same recipe, since the files' bytes are hashed beside."""

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(one) for one in value]
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items()}
        return None if isinstance(value, str) and value in paths else value

    return {key: without(value) for key, value in settings.items()}
