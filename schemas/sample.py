"""The sample: one training example and where it came from. Immutable; its id is a hash of its content."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.canonical import content_hash

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["chat", "preference", "text"]
Origin = Literal["real", "made"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: str


class Provenance(BaseModel):
    """Where a sample came from.

    `parents` are the ids of the samples that its prompt showed; `call` is the key of the ledger's entry that it was parsed
    from; `axes` are the values of variation that were asked for; `logprob` is the mean log-probability of the answer's tokens,
    where the teacher told it and the answer is this one sample; `source` is the file and line of a real row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: Origin
    generator: str
    round: int = 0
    parents: tuple[str, ...] = ()
    teacher: str | None = None
    call: str | None = None
    template: str | None = None
    axes: dict[str, str] = Field(default_factory=dict)
    logprob: float | None = None
    source: str | None = None


class Sample(BaseModel):
    """One training example: chat `messages`; or a preference (`messages` is the prompt, `chosen`, `rejected`); or `text`.

    `label` is the class that a labelled task balances over; it and `meta` annotate the sample and are not its identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[Message, ...] = ()
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    text: str | None = None
    label: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    holdout: bool = False
    provenance: Provenance

    @model_validator(mode="after")
    def _one_kind(self) -> Sample:
        if self.text is not None and (self.messages or self.chosen or self.rejected):
            raise ValueError("a sample is text or messages, not both")
        if self.text is None and not self.messages:
            raise ValueError("a sample has text or messages; this one has neither")
        if bool(self.chosen) != bool(self.rejected):
            raise ValueError("a preference has both chosen and rejected; one is missing")
        return self

    @property
    def kind(self) -> Kind:
        return "text" if self.text is not None else "preference" if self.chosen else "chat"

    @cached_property
    def id(self) -> str:
        """The hash of what a model would be trained on; two samples of the same content are the same sample."""

        def turns(messages: tuple[Message, ...]) -> list[list[str]]:
            return [[m.role, m.content] for m in messages]

        return content_hash("s1", [turns(self.messages), turns(self.chosen), turns(self.rejected), self.text])

    @property
    def input(self) -> str:
        """What a model is shown: the conversation up to its last assistant turn (a preference: the prompt; a text: all of it)."""
        if self.text is not None:
            return self.text
        before = self.messages[:-1] if self.kind == "chat" and self.messages[-1].role == "assistant" else self.messages
        if len(before) == 1:
            return before[0].content
        return "\n".join(f"{m.role}: {m.content}" for m in before)

    @property
    def output(self) -> str:
        """What a model is taught to say: the last assistant turn (a preference: the chosen answer; a text: nothing)."""
        last = self.chosen or self.messages
        return last[-1].content if last and last[-1].role == "assistant" else ""


class Failure(BaseModel):
    """Something that was to become a sample and did not: an answer that could not be parsed, a line that could not be read.

    `reason` is a short code that the funnel counts; `detail` says what was wrong; `text` holds what there was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str
    detail: str = ""
    text: str = ""
    teacher: str | None = None
    call: str | None = None
    source: str | None = None
