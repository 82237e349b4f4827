"""Pace: how fast one account is asked, so that its server is used in full and never has to say "too many requests".

Pure arithmetic: no clock, no sleeping, no asyncio. Whoever sends says what the time is, and what came of each request.

These hold a request back, each with its own model of the server:

- `Bucket`, a rate: told by the server's headers, given in the recipe, or learned. A token bucket: it holds at most `capacity`,
  each request takes its share, and it refills at `rate` a second.
- `Learned`, the rate that refusals tell of. Additive increase and multiplicative decrease (Chiu & Jain 1989), from goodput.
- `Crowd` and `Queueing`, how many may be in flight, below the recipe's number: refusals tell of the one, and latency of the other
  (as in TCP Vegas, Brakmo & Peterson 1995).
- `Pace` itself: one request until anything is known, a server's wish to be left alone, and one probe after that.

What is assumed of a server that tells its limits: it counts a request between its sending and its answer, soon after the
sending (`COUNTED_S`); it writes the headers at any moment between; `remaining` already counts the request itself; `reset_s` is
the time until nothing is counted any more. In a token bucket that time is in proportion to what is missing. In a fixed or a
sliding window it is not, and so they are told apart: nothing is believed to come back in a window before it has turned, and
then one request asks how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from factory.teacher import Limits
from schemas.call import Reading

RESERVE = 1.0  # stays in a told bucket: a server rounds, and a clock drifts
# Of the refill, and of it shared by the capacity: a rate is told in rounded numbers, rounder in small buckets.
MARGIN, MARGIN_EACH = 0.002, 0.05
COUNTED_S = 1.0  # after which a server has counted what was sent to it, whether its answer is there or not
TURN_S = 1.0  # a window may turn so much later than its server said: some tell whole seconds
MEMORY_S = 180.0  # how long a reading is compared with later ones to tell a bucket from a window
MOST_DOUBTS = 2  # refusals of a number in flight that had been borne, before the rate is blamed
SPARE = 0.95  # of the number in flight, where every refusal costs a pause
CUT, CUT_LITTLE = 0.9, 0.95  # of the goodput, when the pace was too fast; of the pace, when it was about right
RAISE_FAST, RAISE, RAISE_LEAST = 0.01, 0.001, 0.0002  # of the pace with every answer: where no limit is known, then less and less
PROVEN_S = 20.0  # goodput over so long is a limit's own rate, whatever the pace was
FEWEST_QUIET, MOST_QUIET = 8, 512  # answers without a refusal before one more is let in flight
MOST_QUIET_COSTLY = 8192  # the same, where every refusal costs a pause
WAVE = 32  # in flight: of fewer, two means of latencies tell nothing
PAUSE_S, LONGEST_PAUSE_S = 0.1, 60.0  # before a probe, where the server does not say; longer with each probe that is refused


MISTRUSTED_AFTER = 4  # round trips of nothing but refusals, after which headers alone are not followed any more


class Belief(NamedTuple):
    """What was believed of a told bucket when a request was sent: its level, and how much readings had raised and lowered it by then."""

    level: float
    raised: float
    lowered: float


@dataclass(slots=True, eq=False)
class Sent:
    """A request in flight, how many requests and tokens were in flight before it, and what was believed of each told bucket."""

    number: int
    at: float
    tokens: int
    ahead: int
    tokens_ahead: int
    beliefs: tuple[Belief, ...]


class Bucket:
    """A token bucket, seen from afar: `level` is the least that may be left at the server once all that was sent is counted.

    That it is the least follows from a property of the token bucket: as long as it is not full, what is left depends only on how
    much was counted, not on when. Only a full bucket loses what would flow in, so what may not be counted yet (sent within
    `counted_s`) is kept free below the brim.
    """

    def __init__(self, of_tokens: bool, capacity: float, rate: float, level: float, now: float, *, told: bool = False) -> None:
        self.of_tokens, self.capacity, self.rate, self.level = of_tokens, capacity, rate, level
        self.limit = capacity  # as the server tells it
        self.born = self._at = self._since = now
        self.reserve, self._margin = (RESERVE, MARGIN + MARGIN_EACH / max(capacity, 2)) if told else (0.0, 0.0)
        self.kind: Literal["bucket", "window", "unknown"] = "unknown" if told else "bucket"
        self.full_at = math.inf
        self._counted_s = min(COUNTED_S, capacity / rate / 4) if told else 0.0
        self._lately = self._before = 0.0  # sent within the last and the last but one `counted_s`
        self._slice_ends = now
        self._raised = self._lowered = 0.0  # by readings, in all
        self._drain = 0.0  # the share of the refill that others take
        self._rate_told = False
        self._slowest: tuple[float, float, float] | None = None  # of the readings: the one with the longest reset for what was missing

    def wait_s(self, amount: float, now: float, alone: bool) -> float:
        """Seconds until `amount` may be taken; inf where only a reading can tell. `alone`: nothing is in flight that could bring one.

        What is more than a bucket can ever hold is let through when it is full.
        """
        self._advance(now)
        missing = min(amount + self.reserve, self.capacity) - self.level
        if missing <= 1e-6:
            return 0.0
        if self.kind == "bucket":
            return missing / self._refill
        wait_s = self.full_at - now
        if alone and (self.kind == "unknown" or wait_s == math.inf):
            wait_s = min(wait_s, self._since + missing / self.rate - now)
        return max(0.0, wait_s)

    def take(self, amount: float, now: float) -> None:
        self._advance(now)
        self.level -= amount
        self._lately += amount
        self._since = now
        if now >= self.full_at:
            self.full_at = math.inf  # this one asks; its reading says what is left and when the window turns next

    def give_back(self, amount: float) -> None:
        """Less was used than was taken."""
        self.level = min(self.level + amount, max(self.level, self.capacity))

    def describe(self) -> str:
        what = "tokens" if self.of_tokens else "requests"
        return f"{self.capacity:,.0f} {what} in a window" if self.kind == "window" else f"{self.rate * 60:,.0f} {what} a minute"

    def belief(self) -> Belief:
        return Belief(self.level, self._raised, self._lowered)

    def hear(self, reading: Reading, sent_at: float, then: Belief, ahead: tuple[float, float], now: float) -> None:
        """Reconcile with a reading that was written between `sent_at` and `now`.

        `then` is what was believed at `sent_at`; `ahead` is what else was in flight then and is now. The reading fits if there was
        such a level at either end, give or take what was in flight and perhaps not counted, and what other readings have mended
        since. Only what does not fit moves the level: less than the least is others' use, more than the most is use that
        the server did not count. So an old reading that comes late does no harm: it fits what was believed when it was asked for.
        """
        self._advance(now)
        self._learn(reading, sent_at, now)
        low = min(then.level - (self._lowered - then.lowered), self.level) - 1  # a server tells whole numbers
        high = max(then.level + (self._raised - then.raised) + ahead[0], self.level + ahead[1])
        if reading.remaining < low:
            self._move(reading.remaining - low)
        elif reading.remaining > high:
            self._move(reading.remaining - high)
            if self.kind == "unknown" and not self.of_tokens and reading.remaining >= high + 2 and now < self.full_at:
                self.kind = "bucket"  # some came back before any window could turn
        else:
            self._drain *= 0.9998  # too little waste to show in a reading would last for ever
        self._since = now

    def overran(self) -> None:
        """A request was refused for want of what was believed to be there."""
        self._move(-RESERVE)

    @property
    def _refill(self) -> float:
        return self.rate * max(0.05, 1 - self._margin - self._drain)

    def _move(self, by: float) -> None:
        self.level = min(self.level + by, self.capacity)
        self._raised += max(by, 0.0)
        self._lowered -= min(by, 0.0)
        step = math.copysign(min(0.05, abs(by) / (10 * self.rate)), -by)
        self._drain = min(0.9, max(0.0, self._drain + step))

    def _advance(self, now: float) -> None:
        passed = now - self._at
        if passed <= 0:
            return
        self._at = now
        if now >= self._slice_ends:
            self._before = self._lately if now < self._slice_ends + self._counted_s else 0.0
            self._lately = 0.0
            self._slice_ends = now + self._counted_s
        if self.kind == "bucket":
            brim = self.capacity - self._lately - self._before
            if self.level < brim:
                self.level = min(self.level + passed * self._refill, brim)

    def _learn(self, reading: Reading, sent_at: float, now: float) -> None:
        """Learn the rate, whether it is a window, and when that turns."""
        missing, reset_s = self.capacity - reading.remaining, reading.reset_s
        if reset_s is None:
            self.kind = "bucket"
            return
        if missing <= 0 or reset_s <= 0:
            return
        rate = missing / reset_s
        # What is missing and what a reset takes are both rounded: the emptier the bucket, the truer the rate. The lower of
        # two rates is the safer; what it wastes shows as a level above the believed one, and is taken from there.
        if missing >= self.capacity / 10:
            self.rate += (rate - self.rate) / (2000 if self._rate_told and rate > self.rate else 1)
            self._rate_told = True
            self._counted_s = min(COUNTED_S, self.capacity / self.rate / 4)
        if self._slowest and now < self._slowest[2] + MEMORY_S:
            before, before_s, _ = self._slowest
            if missing - before >= max(2.0, self.capacity / 20) and before <= 0.8 * missing:
                # As much longer a reset as more is missing: a bucket. No longer a reset: a window. Halfway is the border.
                self.kind = "bucket" if before_s / reset_s < (1 + before / missing) / 2 else "window"
        if not self._slowest or now >= self._slowest[2] + MEMORY_S or rate < self._slowest[0] / self._slowest[1]:
            self._slowest = (missing, reset_s, now)
        if sent_at + reset_s > now:  # else it may be the turn of a window that is over
            full_at = now + reset_s + min(TURN_S, reset_s / 20)
            self.full_at = full_at if self.full_at == math.inf or sent_at + reset_s > self.full_at else min(self.full_at, full_at)


class Crowd:
    """How many may be in flight at most: the recipe's number, or fewer where a server refuses the others.

    Where a server lets in only so many, as many as it bears are in flight once the refused ones are not: that is the new number.
    One more is tried after ever more answers without a refusal, so a limit that stays is touched ever more rarely. Where
    refusals go on although ever fewer are in flight, the number was not to blame, and what was taken is given back.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = self.most = concurrency
        self._before, self._since_cut = concurrency, MOST_QUIET  # the number before it was cut, and answers since
        self._changed_after = -1  # the number of the last request before it was changed
        self._quiet, self._patience, self._grew, self._doubts = 0, FEWEST_QUIET, False, 0

    def was_full(self, sent: Sent) -> bool:
        return sent.ahead + 1 >= self.most

    def answered(self, sent: Sent, latest: int) -> None:
        if self.most == self.concurrency or sent.number <= self._changed_after:
            return
        self._since_cut += 1
        self._quiet += 1
        if self._quiet >= self._patience:
            if self._grew and self.most > self._before:  # more than was ever refused
                self._patience = max(FEWEST_QUIET, self._patience // 2)
            self._grew = True
            self._change(min(self.concurrency, self.most + (max(1, self.most // 4) if self._patience == FEWEST_QUIET else 1)), latest)

    def refused(self, sent: Sent, in_flight: int, latest: int, *, costly: bool) -> bool:
        """Whether the number in flight was to blame; then it is cut to what is in flight now, the refused one left out.

        `costly`: a refusal brings a pause, so the number is kept a little below the limit, and the limit is seldom tried.
        """
        at_once = max(sent.ahead, in_flight) + 1  # in a burst the order of arriving is not that of sending
        if sent.number > self._changed_after:
            if at_once < max(2, self.most):
                return False
            if self._grew or self._since_cut >= max(FEWEST_QUIET, self.most):  # the last cut did help, for so long
                self._doubts = 0 if self._grew else self._doubts + 1  # it bore as many until now: once that may be
                if self._doubts > MOST_DOUBTS:
                    return False
                self._before, self._since_cut = self.most, 0
                self._patience, self._grew = min(MOST_QUIET_COSTLY if costly else MOST_QUIET, 2 * self._patience), False
            elif self.most <= self._before // 2:
                return False
        if in_flight + 1 >= self.most:
            self._change(max(1, round(in_flight * (SPARE if costly else 1))), latest)
        return True

    def absolve(self, latest: int) -> None:
        """The rate was to blame."""
        self._patience, self._grew, self._since_cut, self._doubts = FEWEST_QUIET, False, MOST_QUIET, 0
        self._change(max(self.most, self._before), latest)

    def _change(self, most: int, latest: int) -> None:
        self.most, self._changed_after, self._quiet = most, latest, 0


class Queueing:
    """How many in flight are of use to a server that never refuses and lets the others wait in line, as vLLM does.

    Latency varies by nature, and grows with the length of answers; that says nothing. But in a queue the first wave, which
    meets it empty, waits half as long on average as the second, which meets it full, in whatever order each arrives. Where that is
    so, the number in flight is halved as long as goodput does not fall. What was gained by it is only shorter waits, so in doubt all
    stays as it was, and now and then it is seen whether the whole number has become of use.
    """

    def __init__(self, concurrency: int) -> None:
        self.concurrency = self.most = concurrency
        self._phase: Literal["waves", "trial", "rest", "off"] = "waves" if concurrency >= WAVE else "off"
        self._base: int | None = None  # the number of the lone first request
        self._waves = ([0, 0, 0.0], [0, 0, 0.0])  # of each: answers, in flight ahead, latencies
        self._began, self._count = 0.0, 0
        self._waited, self._least_s = 0.0, math.inf
        self._goodput, self._tried_from = 0.0, concurrency

    def answered(self, sent: Sent, now: float) -> None:
        if self._phase == "off":
            return
        self._least_s = min(self._least_s, now - sent.at)
        if self._base is None:
            self._base, self._began = sent.number, now
        elif self._phase == "waves":
            self._see(sent, now)
        elif self._phase == "trial":
            self._try(sent, now)
        else:
            self._count += 1
            if self._count >= 50 * self.concurrency:
                self._change(self.concurrency)

    def _see(self, sent: Sent, now: float) -> None:
        wave = (sent.number - (self._base or 0) - 1) // self.concurrency
        if wave > 1:
            return
        sums = self._waves[wave]
        sums[0] += 1
        sums[1] += sent.ahead
        sums[2] += now - sent.at
        self._count += 1
        if self._count == 2 * self.concurrency:
            (_, ahead, waited), (_, ahead_then, waited_then) = self._waves
            if ahead_then > 1.5 * ahead and waited_then > 1.6 * waited:
                self._goodput = self._count / max(now - self._began, 1e-9)
                self._change(self.most // 2)
            else:
                self._phase = "off"

    def _try(self, sent: Sent, now: float) -> None:
        """Whether goodput is the same once what was in flight before is answered."""
        self._count += 1
        if self._count <= self._tried_from:
            self._began, self._waited = now, 0.0
            return
        self._waited += now - sent.at
        if self._count < self._tried_from + self.concurrency:
            return
        goodput = self.concurrency / max(now - self._began, 1e-9)
        if self.most > self._tried_from:  # the whole number again
            self._rest(self.most if goodput > 1.1 * self._goodput else self._tried_from)
        elif goodput < 0.9 * self._goodput:
            self._rest(self._tried_from)
        elif self._waited > 2 * self._least_s * self.concurrency and self.most >= 8:
            self._change(self.most // 2)
        else:
            self._rest(self.most)

    def _change(self, most: int) -> None:
        self._tried_from, self.most = self.most, most
        self._phase, self._count = "trial", 0

    def _rest(self, most: int) -> None:
        self.most, self._count = most, 0
        self._phase = "rest" if most < self.concurrency else "off"


class Learned:
    """A rate that a server keeps to itself, as far as its refusals tell it: cut when it refuses, and raised with each answer.

    What was sent since the last cut and not refused is what the limit let through meanwhile: goodput, and the next pace. Where the
    pace was about right, goodput says less than the pace does, because of the pauses.
    """

    def __init__(self) -> None:
        self.bucket: Bucket | None = None
        self.resumed_at = -math.inf  # after the pause that a cut brings
        self._cut_at, self._cut_after = -math.inf, -1  # the time of the last cut, and the number of the last request before it
        self._after_cut, self._too_fast = 0.0, math.inf  # the pace then, and the one that was refused
        self._step = RAISE_FAST

    def begin(self, now: float) -> None:
        self._cut_at = now

    def is_news(self, sent: Sent) -> bool:
        """Whether a request was sent at the present pace; what becomes of older ones has been counted already."""
        return sent.number > self._cut_after

    def cut(self, latest: int, now: float) -> None:
        passed_s, paced_s, count = max(now - self._cut_at, 1e-3), now - self.resumed_at, latest - self._cut_after - 1
        rate, step = max(CUT * count / passed_s, 1 / LONGEST_PAUSE_S), RAISE_FAST
        if self.bucket:
            self._too_fast = self.bucket.rate
            if paced_s > passed_s / 2 and count / paced_s > 0.8 * self._too_fast:
                rate, step = CUT_LITTLE * self._too_fast, max(RAISE_LEAST, min(RAISE, self._step / 4))
            elif passed_s > PROVEN_S:
                step = RAISE
            else:
                rate = max(rate, self._too_fast / 10)
        self.bucket = Bucket(False, max(1.0, rate / 20), rate, 0.0, now)
        self._cut_at, self._cut_after, self._after_cut, self._step = now, latest, rate, step

    def answered(self) -> bool:
        """Raise the pace; whether it is so far above the last refusal that there is no such limit any more."""
        if self.bucket is None:
            return False
        far = self.bucket.rate >= min(2 * self._after_cut, self._too_fast)
        self.bucket.rate *= 1 + (RAISE if far else self._step)
        return self.bucket.rate > 20 * self._after_cut


class Pace:
    """The rate and the number in flight of one account (server, model and key). Times are monotonic seconds."""

    def __init__(self, limits: Limits, concurrency: int) -> None:
        self.in_flight = 0
        self._tokens_in_flight = 0
        self._crowd, self._queueing = Crowd(concurrency), Queueing(concurrency)
        self._given = [
            Bucket(of_tokens, max(1.0, a_minute / 10), a_minute / 60, max(1.0, a_minute / 10), -math.inf)
            for of_tokens, a_minute in ((False, limits.requests_per_minute), (True, limits.tokens_per_minute))
            if a_minute
        ]
        self._told: dict[str, Bucket] = {}
        self._learned = Learned()
        self._buckets = list(self._given)  # all of these
        self._known = False  # whether anything was answered
        self._quiet_until = -math.inf
        self._probe: Sent | Literal["due"] | None = None
        self._pause_s = 0.0
        self._latest = self._refused_at = -1  # the number of the last request, and of the last that was sent when one was refused
        self._refused_in_row = 0  # round trips of nothing but refusals

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until a request of so many tokens may be sent, or until it is worth asking again; inf: not before the next answer."""
        in_flight = self.in_flight
        if in_flight and (
            not self._known
            or in_flight >= self._crowd.most
            or in_flight >= self._queueing.most
            or (self._probe is not None and self._probe != "due")
        ):
            return math.inf
        wait_s = max(0.0, self._quiet_until - now)
        for bucket in self._buckets:
            wait_s = max(wait_s, bucket.wait_s(tokens if bucket.of_tokens else 1, now, not in_flight))
        return wait_s

    def send(self, tokens: int, now: float) -> Sent:
        """A request is sent now, for which the server may count at most `tokens` (of its prompt, and of the longest answer)."""
        for bucket in self._buckets:
            bucket.take(tokens if bucket.of_tokens else 1, now)
        if self._latest < 0:
            self._learned.begin(now)
        self._latest += 1
        sent = Sent(self._latest, now, tokens, self.in_flight, self._tokens_in_flight, tuple([b.belief() for b in self._told.values()]))
        self.in_flight += 1
        self._tokens_in_flight += tokens
        if self._probe == "due":
            self._probe = sent
        return sent

    def heard(self, sent: Sent, now: float, readings: Sequence[Reading], *, tokens: int) -> None:
        """It was answered, and used `tokens` in truth."""
        self._end(sent)
        self._known, self._refused_in_row = True, 0
        if self._probe is sent:
            self._probe, self._pause_s, self._learned.resumed_at = None, 0.0, now
        for bucket in self._given:
            if bucket.of_tokens:
                bucket.give_back(sent.tokens - tokens)
        if readings:
            self._read(sent, readings, now)
        self._crowd.answered(sent, self._latest)
        self._queueing.answered(sent, now)
        if self._learned.bucket and self._learned.is_news(sent) and not self._crowd.was_full(sent) and self._learned.answered():
            self._learned.bucket = None
            self._gather()

    def refused(self, sent: Sent, now: float, readings: Sequence[Reading], retry_after_s: float | None) -> None:
        """The server would not have it: too many requests, or too busy."""
        self._end(sent)
        if readings:
            self._read(sent, readings, now)
        if retry_after_s:
            self._quiet_until = max(self._quiet_until, now + retry_after_s)
        was_probe = self._probe is sent
        if was_probe:
            self._probe = "due"
        short = [r.of for r in readings if r.of in self._told and r.remaining < (1 if r.of == "requests" else sent.tokens)]
        for of in short:
            self._told[of].overran()
        if sent.number > self._refused_at:
            self._refused_at = self._latest  # what was sent before it could be known does not count again
            self._refused_in_row += 1
        if short and self._refused_in_row < MISTRUSTED_AFTER:
            return  # the headers say why, and the buckets know it now
        if short:
            self._pause(now, retry_after_s)  # what is believed of them is wrong
            return
        if was_probe or not self._known:
            self._pause(now, retry_after_s)
        elif self._crowd.refused(sent, self.in_flight, self._latest, costly=bool(retry_after_s)):
            if retry_after_s and self._probe is None:
                self._probe = "due"
        elif self._learned.is_news(sent):
            self._crowd.absolve(self._latest)
            self._learned.cut(self._latest, now)
            self._gather()
            self._probe = "due"
            self._pause(now, retry_after_s)

    def failed(self, sent: Sent, now: float) -> None:
        """It ended in any other way, which says nothing of a limit; the server may have counted it."""
        self._end(sent)
        if self._probe is sent:
            self._probe = "due"

    def describe(self) -> str:
        """What holds it back, in a few words for people."""
        words = [f"{bucket.describe()}, by the recipe" for bucket in self._given]
        words += [f"{bucket.describe()}, by its headers" for bucket in self._told.values()]
        if self._learned.bucket:
            words.append(f"{self._learned.bucket.describe()}, learned")
        most = min(self._crowd.most, self._queueing.most)
        words.append(f"{most} at once" + (", learned" if most < self._crowd.concurrency else ""))
        return "; ".join(words)

    def _end(self, sent: Sent) -> None:
        self.in_flight -= 1
        self._tokens_in_flight -= sent.tokens

    def _read(self, sent: Sent, readings: Sequence[Reading], now: float) -> None:
        for reading in readings:
            if reading.limit <= 0:
                continue
            of_tokens, bucket = reading.of != "requests", self._told.get(reading.of)
            ahead_now = self._tokens_in_flight if of_tokens else self.in_flight
            if bucket is None or (reading.limit != bucket.limit and sent.at > bucket.born):
                counted = sent.tokens_ahead + sent.tokens if of_tokens else sent.ahead + 1
                capacity = _capacity(reading, counted)
                bucket = Bucket(of_tokens, capacity, reading.limit / 60, min(reading.remaining, capacity) - ahead_now, now, told=True)
                bucket.limit = reading.limit
                self._told[reading.of] = bucket
                self._gather()
            elif reading.limit != bucket.limit:
                continue  # of before the limit was changed
            place = list(self._told).index(reading.of)
            then = sent.beliefs[place] if sent.at >= bucket.born and place < len(sent.beliefs) else bucket.belief()
            bucket.hear(reading, sent.at, then, (sent.tokens_ahead if of_tokens else sent.ahead, ahead_now), now)

    def _pause(self, now: float, retry_after_s: float | None) -> None:
        if not retry_after_s:
            self._pause_s = min(LONGEST_PAUSE_S, 1.5 * self._pause_s or PAUSE_S)
            self._quiet_until = max(self._quiet_until, now + self._pause_s)

    def _gather(self) -> None:
        self._buckets = [*self._given, *self._told.values()] + ([self._learned.bucket] if self._learned.bucket else [])


def _capacity(reading: Reading, counted: float) -> float:
    """What the server's bucket holds: its limit, unless far more than we sent is missing from that and yet it is soon full again.

    Some servers tell a limit a minute and keep a smaller bucket: 9 of 600 left after the first request, and full again in 100 ms.
    """
    missing, a_second = reading.limit - reading.remaining, reading.limit / 60
    if reading.reset_s is None or missing <= 2 * counted + reading.limit / 50 or missing <= 3 * a_second * reading.reset_s:
        return reading.limit
    return min(reading.limit, max(1.0, reading.remaining + a_second * reading.reset_s))
