"""The call: one question to one teacher, and its answer. What changes the answer is the call's identity; nothing else is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from schemas.canonical import content_hash
from schemas.sample import Message

KEY_VERSION = "c1"


class Params(BaseModel):
    """How a model samples its answer; unset ones are not sent, so the server's default holds.

    `logprobs` asks how likely the model found its own words; the reply then holds their mean. `top_logprobs` asks for the
    likeliest so many tokens at each position as well, from which a student can learn the teacher's whole distribution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(256, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=1, le=20)
    extra: dict[str, Any] = Field(default_factory=dict, description="passed to the server as they are")

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What is set, as plain data; made once, since a stage gives the same params to all of its calls. Not to be changed."""
        return self.model_dump(exclude_none=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but for `asked`, which it would take along: a copy that asks for something else has another key."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("asked", None)
        return copied


_UNSET = Params()


class Call(BaseModel):
    """One question, as a stage asks it: either `messages` (chat) or `prompt` (raw completion).

    `ref` is the stage's own mark; it comes back with the answer untouched. `aim` says for which place of the target it is put, for the
    records. `draw` asks the same question again on purpose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    params: Params = Field(default_factory=lambda: _UNSET)  # one for all: as a default it would be copied for each call
    json_schema: dict[str, Any] | None = None
    draw: int = 0
    ref: str = ""
    aim: str = ""

    def key(self, provider: str, model: str) -> str:
        """The ledger's key: a hash of everything that changes the answer, and of nothing else.

        In: provider and model (who answers), messages or prompt and schema (what is asked), params (how it is sampled), draw
        (which of several answers). Out: teacher (a name in one recipe), ref and aim (the stage's own), and all of timeouts, retries,
        addresses and concurrency, which a Call does not even hold.
        """
        asked = [[m.role, m.content] for m in self.messages]
        return content_hash(
            KEY_VERSION,
            [provider, model, asked, self.prompt, self.json_schema, self.params.asked, self.draw],
        )


Finish = Literal["stop", "length", "refused", "other"]


class Reply(BaseModel):
    """What a teacher's server said: text, tokens, and why it stopped ("length" means that it was cut).

    `reasoning` is what the model thought before it answered, where the server tells it; it is no part of `text`, and its
    tokens are among `tokens_out`. Of `tokens_in`, `tokens_cached` were read from the server's prompt cache and
    `tokens_to_cache` written to it, which have prices of their own. `logprob` is the mean natural log-probability of the
    answer's tokens, and `top_logprobs` the likeliest at each position, packed by `schemas.logprobs`; both where asked for and told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    finish: Finish
    tokens_in: int
    tokens_out: int
    logprob: float | None = None
    reasoning: str | None = None
    tokens_cached: int = 0
    tokens_to_cache: int = 0
    top_logprobs: str | None = None


Of = Literal["requests", "tokens", "tokens_in", "tokens_out"]


class Reading(NamedTuple):
    """What a server's headers say of one of its rate limits: so many of `limit` are left, and it is full again in `reset_s` seconds.

    `of` is what it limits: requests, or tokens (of both directions, of questions, of answers).
    """

    of: Of
    limit: int
    remaining: int
    reset_s: float | None = None


class Answer(BaseModel):
    """What comes back from the gateway for one call: a reply, or the reason why there is none.

    `fresh` is false when the ledger answered. `micro_usd` is what this answer cost when it was bought; None: price unknown.
    `teacher` is who answered: another than the call's where that one was down and names a fallback.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    call: Call
    key: str
    reply: Reply | None
    error: str | None = None
    fresh: bool = True
    micro_usd: int | None = 0
    teacher: str = ""
