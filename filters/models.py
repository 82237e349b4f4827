"""Models that score rows on this machine, by transformers: opened once a process, asked by one thread at a time, in even batches."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from factory.errors import GristmillError, MissingExtra
from factory.stage import Filter

T = TypeVar("T")
Tokens = list[int]
Turns = list[dict[str, str]]
Key = tuple[tuple[int, ...], int]  # what makes two rows equal: tokens, and where what is in question starts
Task = Literal["causal", "classifier"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

NOT_JUDGED = "not judged"
NO_ANSWER = "there is no answer"
NOTHING = "there is nothing to score"
NO_NUMBER = "the model gave no number"
REFUSED = "the model's chat template refuses these turns"
FEWEST_SEEDS = 5  # that can say what is usual
CHARS_A_TOKEN = 32  # a text of more than so many a token that is allowed is not even read: it can only be too long


class ByModel(Filter):
    """What every filter that asks a model on this machine can be told about it.

    A row of more than `max_tokens`, or of more than the model was made for, is not judged: nothing is ever cut.
    """

    model: str = Field(min_length=1, description="a folder, a .gguf file, or a hub name that is in the cache")
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    gguf_file: str | None = Field(None, description="the file in the folder or repository, where the weights are a GGUF")
    dtype: Dtype = Field("auto", description="auto: float32 on the CPU, else as the weights are")
    device: Device = Field("auto", description="auto: cuda where there is one")
    batch_tokens: int = Field(1024, ge=1, description="tokens, padding included, that go through the model at once")
    max_tokens: int = Field(2048, ge=2, description="a longer row is not judged")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="passed to from_pretrained as they are")
    on_failure: Literal["reject", "keep"] = "reject"


class Shown(NamedTuple):
    """What a model is to be shown of a row: a `text`, and the `answer` to it; or `error`, why it can't be.

    special: the tokenizer adds its special tokens, as a classifier without a chat template wants it; text and answer are then a
    pair. A template has them in its text. A causal model's text begins as its texts do: a template sees to that too.
    """

    text: str = ""
    answer: str | None = None
    special: bool = False
    error: str | None = None


class Read(NamedTuple):
    """One row as a model reads it: `tokens`, of which those from `start` on are in question; or `error`, why it can't."""

    tokens: Tokens
    start: int = 0
    error: str | None = None


class Model:
    """A model with its tokenizer, open. Safe to use from several threads: all that touches either waits its turn."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self._lock = threading.RLock()
        self._known: dict[str, Any] = {}

    def known(self, question: Any, find: Callable[[], T]) -> T:
        """What `find` gave when this `question` (a JSON value) was first put: the seeds are scored once, not once a batch."""
        key = hashlib.blake2b(json.dumps(question, sort_keys=True).encode(), digest_size=16).hexdigest()
        with self._lock:
            if key not in self._known:
                self._known[key] = find()
            found: T = self._known[key]
            return found

    def shown(self, turns: Turns, *, reply: bool) -> str | None:
        """A conversation as the tokenizer's chat template renders it; without a template, a line a turn: "user: ...".

        reply: the last turn is to be answered, and the text ends where the answer begins. None: the template refuses these turns.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) + ("\nassistant: " if reply else "")
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply)
        except (TemplateError, TypeError, ValueError):
            return None
        return text

    def read(self, rows: Sequence[Shown], most: int) -> list[Read]:
        """The tokens of each row, or why there are none, as where there are more than `most`. A loop: tokenizers take a text at a time."""
        # Of what the model and its tokenizer say they can read, the first may be missing, and the second be 10^30.
        most = min(most, getattr(self.model.config, "max_position_embeddings", None) or most, self.tokenizer.model_max_length or most)
        with self._lock:
            return [self._read(row, most) for row in rows]

    def _read(self, row: Shown, most: int) -> Read:
        if row.error is not None:
            return Read([], error=row.error)
        if (chars := len(row.text) + len(row.answer or "")) > most * CHARS_A_TOKEN:
            return Read([], error=f"{chars} characters, more than {CHARS_A_TOKEN} for each of {most} tokens")
        if row.special or row.answer is None:
            tokens, start = self.tokenizer(row.text, row.answer, add_special_tokens=row.special, verbose=False).input_ids, 0
        else:
            # Read apart, the answer is of the same tokens after any context.
            before, answer = (self.tokenizer(part, add_special_tokens=False, verbose=False).input_ids for part in (row.text, row.answer))
            begin = self._begin()
            if begin is not None and before[:1] != [begin] and not (before and self.tokenizer.chat_template):
                before = [begin, *before]
            tokens, start = before + answer, max(len(before), 1)  # nothing comes before the first token to expect it from
        if len(tokens) <= start:
            return Read([], error=NOTHING)
        if len(tokens) > most:
            return Read([], error=f"{len(tokens)} tokens, more than {most}")
        return Read(tokens, start)

    def windows(self, text: str, most: int, shared: int) -> list[Read]:
        """A text of any length, read with special tokens, in parts of at most `most` tokens, of which two in a row share `shared`."""
        with self._lock:
            cut = {"truncation": True, "max_length": most, "stride": shared, "return_overflowing_tokens": True}
            return [Read(tokens) for tokens in self.tokenizer([text], **cut).input_ids if tokens]

    def _begin(self) -> int | None:
        begin: int | None = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin  # GPT-2 and its like begin a text by the end of the last

    def digits(self, texts: Sequence[str], where: str) -> Tokens:
        """The tokens that say each of `texts` in one; GristmillError where two of them end in the same token."""
        tokens = [self.tokenizer(text, add_special_tokens=False).input_ids[-1] for text in texts]
        if len(set(tokens)) < len(tokens):
            raise GristmillError(
                f"{self.name!r} has no tokens of their own for {', '.join(texts)}", where=where, next="Name another model."
            )
        return tokens

    def losses(self, rows: Sequence[Read], batch_tokens: int, done: Callable[[int], None] = lambda _: None) -> list[float | None]:
        """Mean loss, in nats a token, of what is in question of each row; None where a row has an error, or the loss is no number."""
        import torch

        def means(logits: Any, batch: list[Read]) -> list[float]:
            # A row at a time: the logits of a batch are large, and are not copied as a whole.
            return [
                float(
                    torch.nn.functional.cross_entropy(
                        logits[i, row.start - 1 : len(row.tokens) - 1].float(),
                        torch.tensor(row.tokens[row.start :], device=logits.device),
                    )
                )
                for i, row in enumerate(batch)
            ]

        return [loss if loss is not None and np.isfinite(loss) else None for loss in self._through(rows, batch_tokens, means, done)]

    def next_logits(self, rows: Sequence[Read], tokens: Tokens, batch_tokens: int) -> list[NDArray[np.float64] | None]:
        """The logits that each of `tokens` is the next one after a row; None where a row has an error."""

        def at_end(logits: Any, batch: list[Read]) -> list[NDArray[np.float64]]:
            return [logits[i, len(row.tokens) - 1, tokens].double().cpu().numpy() for i, row in enumerate(batch)]

        return self._through(rows, batch_tokens, at_end, lambda _: None)

    def class_logits(
        self, rows: Sequence[Read], batch_tokens: int, done: Callable[[int], None] = lambda _: None
    ) -> list[NDArray[np.float64] | None]:
        """The logits of a classifier's labels for each row, shape (labels,); None where a row has an error."""
        return self._through(rows, batch_tokens, lambda logits, batch: list(logits.double().cpu().numpy()), done)

    def _through(
        self, rows: Sequence[Read], batch_tokens: int, take: Callable[[Any, list[Read]], list[T]], done: Callable[[int], None]
    ) -> list[T | None]:
        """What `take` makes of each row's logits.

        Equal rows are read once: the answers of a task of labels are the same few. The rest is sorted by length, then content, so batches
        do not depend on the order of rows.
        """
        import torch

        places: dict[tuple[int, Key], list[int]] = {}
        for i, row in enumerate(rows):
            if row.error is None:
                places.setdefault((len(row.tokens), (tuple(row.tokens), row.start)), []).append(i)
        found: list[T | None] = [None] * len(rows)
        count = 0
        for part in _batches(sorted(places), batch_tokens):
            batch = [rows[places[key][0]] for key in part]
            try:
                with self._lock, torch.inference_mode():
                    taken = take(self._logits([row.tokens for row in batch]), batch)
            except torch.OutOfMemoryError as error:
                mend = "Set a smaller `batch_tokens` or `max_tokens`, or `device: cpu`."
                raise GristmillError(f"{self.name!r} has no memory for {len(batch)} rows at once: {error}", next=mend) from error
            for key, value in zip(part, taken, strict=True):
                for i in places[key]:
                    found[i] = value
                count += len(places[key])
            done(count)
        return found

    def _logits(self, batch: list[Tokens]) -> Any:
        import torch

        config = self.model.config
        # A classifier of the GPT kind reads the last token that is no padding, and knows it by its number. Where the model names
        # none, it is one that no text of the batch holds.
        pad = config.pad_token_id
        if pad is None:
            seen = set().union(*batch)
            pad = next((token for token in range(config.get_text_config().vocab_size) if token not in seen), None)
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in batch])
        mask = torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in batch])
        named, config.pad_token_id = config.pad_token_id, pad
        try:
            return self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        finally:
            config.pad_token_id = named


def opened(stage: Filter, task: Task, name: str, where: str) -> Model:
    """The model `name` with the settings of `stage`, those that it lacks as `ByModel` has them; opened at the first use in this process.

    MissingExtra without torch or transformers; GristmillError where it can't be had: no such folder, not in the hub's cache, no GPU, or
    a model whose head for `task` was never trained.
    """
    known = {field: ByModel.model_fields[field] for field in ("revision", "gguf_file", "dtype", "device", "options")}
    told = {name: getattr(stage, name, field.get_default(call_default_factory=True)) for name, field in known.items()}
    with _OPENING, _said_plainly(name, where):
        return _opened(task, name, json.dumps(told, sort_keys=True))


_HERE: dict[str, Any] = {"local_files_only": True}  # no stage opens a socket: a model is fetched by hand, or by `options`


def is_classifier(stage: Filter, name: str, where: str) -> bool:
    """Whether the model `name` is a sequence classifier, by its configuration; a GGUF is none."""
    if name.endswith(".gguf"):
        return False
    with _said_plainly(name, where):
        from transformers import AutoConfig

        place, _ = _place(name, None)
        revision = getattr(stage, "revision", None)
        given = _HERE | ({"revision": revision} if revision else {}) | _shared(getattr(stage, "options", {}))
        config = AutoConfig.from_pretrained(place, **given)
        return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())


_OPENING = threading.Lock()


@cache
def _opened(task: Task, name: str, told: str) -> Model:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    settings = json.loads(told)
    device = settings["device"] if settings["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise GristmillError("torch finds no CUDA device", next="Set `device: cpu` (or auto), or install a torch that knows the GPU.")
    place, gguf = _place(name, settings["gguf_file"])
    given = _HERE | {key: value for key, value in (("revision", settings["revision"]), ("gguf_file", gguf)) if value is not None}
    dtype = settings["dtype"] if settings["dtype"] != "auto" or device == "cuda" else "float32"
    kind: Any = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    bars: Any = logging
    shows = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # it would write over the live view
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **given | _shared(settings["options"]))
        options = given | {"dtype": dtype, **settings["options"]}
        model, loaded = kind.from_pretrained(place, **options, output_loading_info=True)
    finally:
        if shows:
            bars.enable_progress_bar()
    # transformers fills what a checkpoint lacks with random numbers, and only warns.
    if missing := sorted(loaded["missing_keys"]):
        raise GristmillError(
            f"{name!r} has no trained weights for {', '.join(missing[:3])}",
            next="Name a model that was trained as a classifier." if task == "classifier" else "Name a causal language model.",
        )
    return Model(name, model.to(device).eval(), tokenizer)


@contextmanager
def _said_plainly(name: str, where: str) -> Iterator[None]:
    """What opening a model may raise, as the errors of ours that say what to do."""
    try:
        from huggingface_hub import constants

        # Else it asks the hub, for its telemetry, which programs there are that it might run in: whatever `local_files_only` says.
        constants.HF_HUB_DISABLE_TELEMETRY = True
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "transformers", "models", "a filter that asks a local model") from error
    except GristmillError as error:
        raise GristmillError(error.what, where=where, next=error.next) from error
    except Exception as error:  # the libraries raise what they like for a folder, a name or an option that is not theirs
        said = str(error).strip().split("\n")[0]
        missing = next((package for package in ("gguf", "accelerate") if f"install {package}" in str(error)), None)
        get = f"Install it with: pip install {missing}" if missing else f"Get it: hf download {name}. Or set `model` to a folder."
        raise GristmillError(f"can't open the model {name!r}: {said}", where=where, next=get) from error


def _place(name: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or hub name, and the GGUF in it: `model` may be the path of such a file itself."""
    path = Path(name).expanduser()
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise GristmillError(f"there is no file {name}", next="The project's own: gristmill teachers fetch smollm2-135m-instruct")
        return str(path.parent), path.name
    return (str(path) if path.exists() else name), gguf_file


def _shared(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a tokenizer has to know as well: who may run code, and where files are."""
    return {
        key: value for key, value in options.items() if key in ("trust_remote_code", "cache_dir", "token", "subfolder", "local_files_only")
    }


def _batches(rows: list[tuple[int, Key]], most: int) -> Iterator[list[tuple[int, Key]]]:
    """`rows`, of growing lengths, in parts that hold at most `most` tokens once padded; a longer row is a part of its own."""
    part: list[tuple[int, Key]] = []
    for row in rows:
        if part and (len(part) + 1) * row[0] > most:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def turns_of(samples: pl.DataFrame, answers: Literal["chosen", "rejected"] = "chosen") -> list[Turns]:
    """The whole conversation of each row, a preference's with one of its two answers; empty for a text."""
    turns = pl.concat_list(pl.col("messages"), pl.col(answers))
    return samples.select(turns).to_series().to_list()


def detail_of(told: Sequence[dict[str, Any]]) -> pl.Series:
    """The column `detail` of verdicts, from a dict a row."""
    return pl.Series([json.dumps(one, ensure_ascii=False) for one in told], dtype=pl.String)


def given(model: Model, kind: str, text: str | None, turns: Turns) -> Shown:
    """What a causal model is to be shown of a row: the last answer after its conversation; of a text, all of it after nothing."""
    if kind == "text":
        return Shown("", text) if (text or "").strip() else Shown(error=NOTHING)
    if (error := unanswered(turns)) is not None:
        return Shown(error=error)
    context = model.shown(turns[:-1], reply=True)
    return Shown(error=REFUSED) if context is None else Shown(context, turns[-1]["content"])


def unanswered(turns: Turns) -> str | None:
    """Why a conversation can't be judged, if its last turn is no answer."""
    return None if turns and turns[-1]["role"] == "assistant" and turns[-1]["content"].strip() else NO_ANSWER


def too_few_seeds(setting: str, seeds: int, stage: str) -> GristmillError:
    """What to tell where the seeds can't say what is usual."""
    return GristmillError(
        f"{setting}: auto asks the seeds what is usual, and takes {FEWEST_SEEDS} that can be scored; there are {seeds}",
        where=f"stage {stage}",
        next=f"Set {setting} to a number, or add seeds.",
    )
