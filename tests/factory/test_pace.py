"""Pace against servers of every kind, simulated in virtual time: what share of the limit is used, and how often the server refuses."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import pytest

from factory.pace import Pace, Sent
from factory.teacher import Limits
from schemas.call import Reading

Latency = Callable[[random.Random], float]


def uniform(rng: random.Random) -> float:
    return rng.uniform(0.005, 5.0)


def long_tailed(rng: random.Random) -> float:
    return min(5.0, 0.005 + rng.expovariate(1 / 0.4))


def short(rng: random.Random) -> float:
    return rng.uniform(0.005, 0.05)


class Server(Protocol):
    def arrive(self, now: float, worst: int, used: int) -> bool: ...
    def leave(self, now: float) -> None: ...
    def readings(self, now: float) -> list[Reading]: ...


@dataclass
class TokenBuckets:
    """Refills continuously. `counts` is what of a request is counted in each bucket; a refused one counts as well."""

    limits: dict[str, tuple[int, float]]  # of -> (capacity, rate a second)
    counts: Callable[[str, int, int], float] = lambda of, worst, used: 1.0 if of == "requests" else float(worst)
    whole_seconds: bool = False
    level: dict[str, float] = field(default_factory=dict)
    at: float = 0.0

    def refill(self, now: float) -> None:
        for of, (capacity, rate) in self.limits.items():
            self.level[of] = min(float(capacity), self.level.get(of, float(capacity)) + rate * (now - self.at))
        self.at = now

    def arrive(self, now: float, worst: int, used: int) -> bool:
        self.refill(now)
        fits = all(self.level[of] >= min(self.counts(of, worst, used), self.limits[of][0]) for of in self.limits)
        for of in self.limits:
            self.level[of] = max(0.0, self.level[of] - self.counts(of, worst, used))
        return fits

    def leave(self, now: float) -> None: ...

    def readings(self, now: float) -> list[Reading]:
        self.refill(now)
        out = []
        for of, (capacity, rate) in self.limits.items():
            reset_s = (capacity - self.level[of]) / rate
            out.append(Reading(of, capacity, int(self.level[of]), math.ceil(reset_s) if self.whole_seconds else reset_s))  # type: ignore[arg-type]
        return out


@dataclass
class FixedWindow:
    limit: int
    window_s: float = 60.0
    tells: bool = True
    began: float = -37.0
    count: int = 0

    def turn(self, now: float) -> None:
        while now >= self.began + self.window_s:
            self.began, self.count = self.began + self.window_s, 0

    def arrive(self, now: float, worst: int, used: int) -> bool:
        self.turn(now)
        self.count += 1
        return self.count <= self.limit

    def leave(self, now: float) -> None: ...

    def readings(self, now: float) -> list[Reading]:
        self.turn(now)
        return [Reading("requests", self.limit, max(0, self.limit - self.count), self.began + self.window_s - now)] if self.tells else []


@dataclass
class SlidingWindow:
    limit: int
    window_s: float = 60.0
    tells: bool = True
    seen: deque[float] = field(default_factory=deque)

    def turn(self, now: float) -> None:
        while self.seen and self.seen[0] <= now - self.window_s:
            self.seen.popleft()

    def arrive(self, now: float, worst: int, used: int) -> bool:
        self.turn(now)
        self.seen.append(now)
        return len(self.seen) <= self.limit

    def leave(self, now: float) -> None: ...

    def readings(self, now: float) -> list[Reading]:
        self.turn(now)
        reset_s = self.seen[-1] + self.window_s - now if self.seen else 0.0
        return [Reading("requests", self.limit, max(0, self.limit - len(self.seen)), reset_s)] if self.tells else []


@dataclass
class HiddenRate:
    """So many a minute, as a token bucket; refused ones do not count; says nothing."""

    a_minute: float
    burst: float
    level: float = math.inf
    at: float = 0.0

    def arrive(self, now: float, worst: int, used: int) -> bool:
        self.level = min(self.burst, self.level + self.a_minute / 60 * (now - self.at))
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def leave(self, now: float) -> None: ...

    def readings(self, now: float) -> list[Reading]:
        return []


@dataclass
class HiddenConcurrency:
    most: int
    inside: int = 0

    def arrive(self, now: float, worst: int, used: int) -> bool:
        if self.inside >= self.most:
            return False
        self.inside += 1
        return True

    def leave(self, now: float) -> None:
        self.inside -= 1

    def readings(self, now: float) -> list[Reading]:
        return []


@dataclass
class Open:
    """No limit at all."""

    def arrive(self, now: float, worst: int, used: int) -> bool:
        return True

    def leave(self, now: float) -> None: ...

    def readings(self, now: float) -> list[Reading]:
        return []


@dataclass
class Queue(Open):
    """`workers` requests at once; the others wait in line, and nobody is told."""

    workers: int = 8
    free_at: list[float] = field(default_factory=list)

    def delay(self, now: float, service_s: float) -> float:
        if not self.free_at:
            self.free_at = [0.0] * self.workers
        ends = max(now, heapq.heappop(self.free_at)) + service_s
        heapq.heappush(self.free_at, ends)
        return ends - now


@dataclass
class Outcome:
    """When what happened. `in_flight` is a sample after each event."""

    seconds: float
    sent: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    in_flight: list[tuple[float, int]] = field(default_factory=list)

    def goodput(self, since: float = 0.0) -> float:
        return sum(t >= since for t in self.answered) / (self.seconds - since)

    def refusals(self, since: float = 0.0) -> float:
        refused = sum(t >= since for t in self.refused)
        return refused / max(1, refused + sum(t >= since for t in self.answered))


def drive(
    ports: Sequence[tuple[Server, Pace]],
    seconds: float,
    latency: Latency,
    *,
    seed: int = 0,
    written: str = "arrival",
    network_s: float = 0.02,
    retry_after_s: float | None = None,
    tokens: Callable[[random.Random], tuple[int, int]] = lambda rng: (100, 50),
    fail_share: float = 0.0,
    others: Sequence[tuple[float, Callable[[float], None]]] = (),
) -> Outcome:
    """Ask as fast as the paces let, for so many seconds of virtual time.

    `tokens` draws (the most a request may count for, what it uses); `written` is when a server writes its headers; `others` is what
    else happens to the servers, and when.
    """
    rng, out, order = random.Random(seed), Outcome(seconds), itertools.count()
    events: list[tuple[float, int, Callable[[float], None]]] = []
    next_up = tokens(rng)
    wake = -1.0

    def at(when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(order), what))

    def hop(now: float) -> float:
        return now + rng.uniform(0.0005, network_s)

    def send(now: float, server: Server, pace: Pace) -> None:
        nonlocal next_up
        (worst, used), next_up = next_up, tokens(rng)
        sent = pace.send(worst, now)
        out.sent.append(now)
        at(hop(now), lambda t: arrive(t, server, pace, sent, worst, used))

    def arrive(now: float, server: Server, pace: Pace, sent: Sent, worst: int, used: int) -> None:
        fits, early = server.arrive(now, worst, used), server.readings(now)
        if not fits:
            at(hop(now), lambda t: refuse(t, pace, sent, early))
            return
        took_s = latency(rng)
        if isinstance(server, Queue):
            took_s = server.delay(now, took_s)
        at(now + took_s, lambda t: leave(t, server, pace, sent, early, used))

    def leave(now: float, server: Server, pace: Pace, sent: Sent, early: list[Reading], used: int) -> None:
        server.leave(now)
        readings = early if written == "arrival" else server.readings(now)
        if rng.random() < fail_share:
            at(hop(now), lambda t: pace.failed(sent, t))
        else:
            at(hop(now), lambda t: hear(t, pace, sent, readings, used))

    def hear(now: float, pace: Pace, sent: Sent, readings: list[Reading], used: int) -> None:
        out.answered.append(now)
        pace.heard(sent, now, readings, tokens=used)

    def refuse(now: float, pace: Pace, sent: Sent, readings: list[Reading]) -> None:
        out.refused.append(now)
        pace.refused(sent, now, readings, retry_after_s)

    for when, what in others:
        at(when, what)
    now = 0.0
    while True:
        for server, pace in ports:
            while (wait_s := pace.wait_s(next_up[0], now)) == 0:
                send(now, server, pace)
            assert wait_s < math.inf or pace.in_flight, "nothing in flight, and nothing to wait for"
            if wait_s < math.inf and not now < wake <= now + wait_s:
                wake = now + wait_s
                at(wake, lambda t: None)
        if not events or events[0][0] > seconds:
            return out
        now, _, what = heapq.heappop(events)
        what(now)
        out.in_flight.append((now, sum(pace.in_flight for _, pace in ports)))


LATENCIES = [pytest.param(latency, id=latency.__name__) for latency in (uniform, long_tailed, short)]
MEAN_S: dict[Latency, float] = {uniform: 2.5025, long_tailed: 0.405, short: 0.0275}


def fresh(concurrency: int = 100, **limits: float) -> Pace:
    return Pace(Limits(**limits), concurrency)


# With headers.


@pytest.mark.parametrize("written", ["arrival", "answer"])
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize(("capacity", "a_second"), [(600, 10.0), (100, 10.0), (10, 10.0), (200, 1 / 6), (3000, 50.0)])
def test_a_told_bucket_is_used_in_full_and_refuses_nothing(capacity: int, a_second: float, latency: Latency, written: str) -> None:
    """Refused requests count at this server: one refusal would bring the next."""
    if a_second * MEAN_S[latency] > 100:
        pytest.skip("more than 100 at once would be needed")
    seconds = 300.0 if a_second > 1 else 3000.0
    out = drive([(TokenBuckets({"requests": (capacity, a_second)}), fresh())], seconds, latency, written=written)
    assert out.refused == []
    # Where more is in flight for so long than a bucket holds, no reading can tell that some is left in it.
    least = 0.99 if capacity > 10 or latency is not uniform else 0.94 if written == "answer" else 0.98
    assert len(out.sent) >= least * (capacity + a_second * (seconds - out.answered[0]))
    # All of the bucket at once, as far as may be in flight: capacity is told apart from what a minute brings.
    assert sum(t < out.answered[0] + 1 for t in out.sent) >= min(0.9 * capacity, 99)


@pytest.mark.parametrize("latency", LATENCIES)
def test_resets_told_in_whole_seconds_do_as_well(latency: Latency) -> None:
    out = drive([(TokenBuckets({"requests": (600, 10.0)}, whole_seconds=True), fresh())], 600, latency)
    assert out.refused == []
    assert len(out.sent) >= 0.99 * (600 + 6000)


@pytest.mark.parametrize("written", ["arrival", "answer"])
@pytest.mark.parametrize("latency", LATENCIES)
def test_windows_are_told_from_buckets_and_refuse_nothing(latency: Latency, written: str) -> None:
    out = drive([(FixedWindow(600), fresh())], 420, latency, written=written)
    assert out.refused == []
    assert out.goodput(since=23) >= 0.95 * 10
    out = drive([(SlidingWindow(600), fresh())], 420, latency, written=written)
    assert out.refused == []
    assert len(out.sent) / 420 >= 0.75 * 10  # a burst that was spread out comes back as late


@pytest.mark.parametrize("latency", LATENCIES)
def test_a_window_that_is_half_used_up_already_refuses_nothing(latency: Latency) -> None:
    out = drive([(FixedWindow(600, count=300), fresh())], 203, latency)
    assert out.refused == []
    assert out.goodput(since=23) >= 0.95 * 10


def mixed(rng: random.Random) -> tuple[int, int]:
    used = rng.randint(200, 800)
    return used + rng.randint(100, 900), used


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("counts_worst", [True, False])
def test_token_limits_whether_the_server_counts_the_most_or_what_is_used(counts_worst: bool, latency: Latency) -> None:
    def counts(of: str, worst: int, used: int) -> float:
        return 1.0 if of == "requests" else float(worst if counts_worst else used)

    server = TokenBuckets({"requests": (6000, 100.0), "tokens": (90_000, 1500.0)}, counts)
    out = drive([(server, fresh())], 400, latency, tokens=mixed)
    assert out.refused == []
    assert out.goodput(since=60) >= 0.96 * 1500 / (1000 if counts_worst else 500)


@pytest.mark.parametrize("latency", LATENCIES)
def test_limits_of_either_direction_are_kept_although_only_their_sum_is_known(latency: Latency) -> None:
    """As Anthropic's: tokens in, tokens out, and requests, each with a bucket; times in whole seconds."""

    def counts(of: str, worst: int, used: int) -> float:
        return {"requests": 1.0, "tokens_in": 0.7 * used, "tokens_out": 0.3 * used}[of]

    limits = {"requests": (1000, 1000 / 60), "tokens_in": (50_000, 50_000 / 60), "tokens_out": (20_000, 20_000 / 60)}
    out = drive([(TokenBuckets(limits, counts, whole_seconds=True), fresh())], 400, latency, tokens=mixed)
    assert out.refused == []
    assert out.goodput(since=120) >= 0.96 * 20_000 / 60 / 150


@pytest.mark.parametrize("latency", LATENCIES)
def test_another_process_that_takes_half_is_made_room_for(latency: Latency) -> None:
    server = TokenBuckets({"requests": (600, 10.0)})

    def eat(now: float) -> None:
        server.arrive(now, 0, 0)

    out = drive([(server, fresh())], 400, latency, others=[(100 + i / 5, eat) for i in range(1500)])
    assert sum(t < 100 for t in out.refused) == 0
    assert out.refusals(since=160) < 0.01
    assert out.goodput(since=160) >= 0.97 * 5


def test_two_processes_share_a_bucket() -> None:
    server = TokenBuckets({"requests": (600, 10.0)})
    out = drive([(server, fresh()), (server, fresh())], 300, long_tailed)
    assert out.refusals() < 0.03
    assert out.goodput(since=80) >= 0.95 * 10


def test_each_account_has_a_pace_of_its_own() -> None:
    ports = [(TokenBuckets({"requests": (60 * n, float(n))}), fresh()) for n in (1, 5, 20)]
    out = drive(ports, 300, long_tailed)
    assert out.refused == []
    assert len(out.sent) >= 0.99 * (60 + 300) * 26


def test_a_limit_that_is_changed_is_followed() -> None:
    server = TokenBuckets({"requests": (600, 10.0)})

    def double(now: float) -> None:
        server.refill(now)
        server.limits["requests"] = (1200, 20.0)

    out = drive([(server, fresh())], 400, long_tailed, others=[(200, double)])
    assert out.refused == []
    assert out.goodput(since=260) >= 0.98 * 20


def test_failures_are_counted_as_the_server_counts_them() -> None:
    out = drive([(TokenBuckets({"requests": (600, 10.0)}), fresh())], 300, long_tailed, fail_share=0.2)
    assert out.refused == []
    assert len(out.sent) >= 0.99 * 3600


def test_a_bucket_that_is_empty_at_the_start_fills_up() -> None:
    out = drive([(TokenBuckets({"requests": (600, 10.0)}, level={"requests": 1.0}), fresh())], 300, long_tailed)
    assert len(out.refused) <= 1
    assert out.goodput() >= 0.97 * 10


def test_a_request_that_is_larger_than_the_bucket_is_sent_when_it_is_full() -> None:
    out = drive([(TokenBuckets({"tokens": (1000, 50.0)}), fresh())], 300, short, tokens=lambda rng: (1500, 1500))
    assert len(out.answered) >= 14
    assert len(out.refused) <= 3


def test_a_reading_that_comes_late_does_no_harm() -> None:
    """The first of a burst is answered last, and says how full the bucket was then."""
    pace = fresh()
    pace.heard(pace.send(1, 0.0), 0.1, [Reading("requests", 100, 99, 0.1)], tokens=1)
    burst = []
    while pace.wait_s(1, 0.1) == 0:
        burst.append(pace.send(1, 0.1))
    assert len(burst) == 98  # one in reserve
    for place, sent in reversed(list(enumerate(burst))):
        pace.heard(sent, 0.2, [Reading("requests", 100, 98 - place, (2 + place) / 10)], tokens=1)
    assert pace.wait_s(1, 0.2) > 0


def test_a_full_bucket_takes_nothing_in_while_a_burst_is_on_its_way() -> None:
    pace = fresh(concurrency=200)
    for missing in (1, 50):  # which tells that it is a bucket, and its rate: 100 a second
        pace.heard(pace.send(1, 0.0), 0.1, [Reading("requests", 100, 100 - missing, missing / 100)], tokens=1)
    sent = 0
    while pace.wait_s(1, 10.0) == 0:
        pace.send(1, 10.0)
        sent += 1
    assert sent == 99
    assert pace.wait_s(1, 10.2) > 0
    assert pace.wait_s(1, 10.8) == 0


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_the_smallest_buckets_are_used_as_well(capacity: int) -> None:
    out = drive([(TokenBuckets({"requests": (capacity, 0.2)}), fresh())], 1200, short)
    assert len(out.refused) <= 1
    assert len(out.sent) >= 0.95 * (capacity + 0.2 * 1200)


def test_a_refusal_that_the_headers_explain_is_not_learned_from() -> None:
    pace = fresh(concurrency=4)
    pace.heard(pace.send(1, 0.0), 0.1, [Reading("requests", 600, 10, 59.0)], tokens=1)
    for _ in range(2):  # somebody else was faster
        pace.refused(pace.send(1, 0.1), 0.2, [Reading("requests", 600, 0, 60.0)], None)
    assert "learned" not in pace.describe()
    assert pace.wait_s(1, 0.2) > 0


def test_the_turn_of_a_window_that_is_over_is_not_waited_for() -> None:
    """An answer that took long tells of the window before, which turned meanwhile: that lets nothing through in the new one."""
    pace = fresh()
    early, late = pace.send(1, 50.0), pace.send(1, 58.0)
    pace.heard(early, 50.1, [Reading("requests", 50, 1, 9.9)], tokens=1)
    pace.heard(pace.send(1, 61.0), 61.1, [Reading("requests", 50, 3, 58.9)], tokens=1)
    while pace.wait_s(1, 61.2) == 0:
        pace.send(1, 61.2)
    pace.heard(late, 63.0, [Reading("requests", 50, 0, 2.0)], tokens=1)
    assert pace.wait_s(1, 66.0) > 10


# From the recipe.


@pytest.mark.parametrize("latency", LATENCIES)
def test_limits_of_the_recipe_are_kept_from_the_first_minute_on(latency: Latency) -> None:
    out = drive([(Open(), fresh(requests_per_minute=300))], 180, latency)
    assert all(sum(begin <= t < begin + 60 for t in out.sent) <= 300 + 30 for begin in range(0, 120, 5))
    assert len(out.sent) >= 0.99 * 5 * 180
    used = 500
    out = drive([(Open(), fresh(tokens_per_minute=60_000))], 300, latency, tokens=mixed)
    assert out.goodput(since=60) == pytest.approx(1000 / used, rel=0.05)


# Without headers.


def test_one_request_until_something_is_known_and_then_all() -> None:
    pace = fresh(concurrency=5)
    assert pace.wait_s(1, 0.0) == 0
    first = pace.send(1, 0.0)
    assert pace.wait_s(1, 1.0) == math.inf
    pace.failed(first, 1.0)
    assert pace.wait_s(1, 1.0) == 0
    second = pace.send(1, 1.0)
    assert pace.wait_s(1, 1.0) == math.inf
    pace.heard(second, 2.0, [], tokens=1)
    for _ in range(5):
        assert pace.wait_s(1, 2.0) == 0
        pace.send(1, 2.0)
    assert pace.in_flight == 5
    assert pace.wait_s(1, 2.0) == math.inf
    assert pace.describe() == "5 at once"


def test_after_the_pause_that_a_server_asks_for_one_probe_is_sent() -> None:
    pace = fresh(concurrency=4)
    pace.heard(pace.send(1, 0.0), 1.0, [], tokens=1)
    a, b = pace.send(1, 1.0), pace.send(1, 1.0)
    pace.refused(a, 2.0, [], 7.0)
    pace.heard(b, 2.0, [], tokens=1)
    assert pace.wait_s(1, 2.0) == pytest.approx(7.0)
    probe = pace.send(1, 10.0)
    assert pace.wait_s(1, 10.0) == math.inf
    pace.refused(probe, 11.0, [], 20.0)
    assert pace.wait_s(1, 11.0) == pytest.approx(20.0)
    probe = pace.send(1, 31.0)
    pace.heard(probe, 32.0, [], tokens=1)
    assert pace.wait_s(1, 60.0) == 0


@pytest.mark.parametrize("retry_after_s", [None, 2.0])
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize(("a_minute", "burst"), [(600, 600), (60, 60), (600, 10)])
def test_a_hidden_rate_is_learned(a_minute: int, burst: int, latency: Latency, retry_after_s: float | None) -> None:
    out = drive([(HiddenRate(a_minute, burst), fresh())], 600, latency, retry_after_s=retry_after_s)
    # The hardest is a bucket of one second's worth where answers take longer: it is full again during any pause, and what a
    # number in flight lets through in a second differs widely.
    least = 0.9 if burst > 10 or latency is not uniform else 0.75 if retry_after_s is None else 0.5
    assert out.goodput(since=200) >= least * a_minute / 60
    assert out.refusals(since=200) < 0.03


@pytest.mark.parametrize("latency", LATENCIES)
def test_hidden_windows_are_learned(latency: Latency) -> None:
    for server, least in ((FixedWindow(600, tells=False), 0.9), (SlidingWindow(600, tells=False), 0.8)):
        out = drive([(server, fresh())], 1200, latency)
        assert out.goodput(since=500) >= least * 10
        assert out.refusals(since=500) < 0.03


def test_a_hidden_rate_leaves_the_number_in_flight_alone() -> None:
    drive([(HiddenRate(60, 5), pace := fresh())], 120, short)
    assert "requests a minute, learned; 100 at once" in pace.describe()


@pytest.mark.parametrize("retry_after_s", [None, 1.0])
@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("most", [3, 20, 60])
def test_a_hidden_number_at_once_is_learned(most: int, latency: Latency, retry_after_s: float | None) -> None:
    possible = most / (MEAN_S[latency] + 0.0055)  # the way there and back is part of it
    seconds = 20 + 3000 / possible
    out = drive([(HiddenConcurrency(most), fresh())], seconds, latency, network_s=0.005, retry_after_s=retry_after_s)
    # A second's pause is very long where answers take a fortieth of it.
    assert out.goodput(since=seconds / 2) >= (0.9 if retry_after_s is None else 0.35 if latency is short else 0.85) * possible
    assert out.refusals(since=seconds / 2) < 0.01


def test_a_hidden_limit_that_moves_is_followed() -> None:
    rate = HiddenRate(600, 60)

    def halve(now: float) -> None:
        rate.a_minute = 300

    out = drive([(rate, fresh())], 500, long_tailed, others=[(200, halve)])
    assert out.goodput(since=300) >= 0.9 * 5
    assert out.refusals(since=300) < 0.03

    crowd = HiddenConcurrency(20)

    def shrink(now: float) -> None:
        crowd.most = 10

    def grow(now: float) -> None:
        crowd.most = 30

    out = drive([(crowd, fresh())], 600, long_tailed, network_s=0.005, others=[(60, shrink), (200, grow)])
    possible = 1 / (MEAN_S[long_tailed] + 0.0055)
    assert sum(80 <= t < 200 for t in out.answered) / 120 >= 0.9 * 10 * possible
    assert out.goodput(since=400) >= 0.9 * 30 * possible
    assert out.refusals(since=60) < 0.03


# Neither headers nor refusals.


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("concurrency", [8, 40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_server_without_limits_is_never_slowed_down(concurrency: int, latency: Latency, seed: int) -> None:
    possible = concurrency / (MEAN_S[latency] + 0.0205)
    out = drive([(Open(), pace := fresh(concurrency))], 3 + 4000 / possible, latency, seed=seed)
    assert pace.describe() == f"{concurrency} at once"
    assert {n for t, n in out.in_flight if t > 6} <= {concurrency - 1, concurrency}


def test_long_answers_are_not_taken_for_a_queue() -> None:
    """Later questions have longer answers: latency grows, and the number in flight has nothing to do with it."""
    rising = itertools.count()
    out = drive([(Open(), pace := fresh())], 300, lambda rng: 1.0 + min(next(rising), 1000) / 100)
    assert pace.describe() == "100 at once"
    assert out.goodput(since=150) >= 0.97 * 100 / 11


@pytest.mark.parametrize("workers", [2, 8, 80])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_a_queue_is_not_made_longer_than_is_of_use(workers: int, spread: float) -> None:
    possible = workers / 0.2
    seconds = 2000 / possible
    out = drive([(Queue(workers), fresh())], seconds, lambda rng: rng.uniform(0.2 - spread, 0.2 + spread))
    assert out.goodput(since=1) >= 0.95 * possible
    later = [n for t, n in out.in_flight if t > seconds / 2]
    assert max(later) <= max(7 * workers, 100 if workers == 80 else 0)


# In any case.


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_server_says_there_is_an_end_to_waiting(seed: int) -> None:
    rng = random.Random(seed)
    pace = Pace(
        Limits(requests_per_minute=rng.choice([None, 0.5, 1000]), tokens_per_minute=rng.choice([None, 10, 1e6])), rng.choice([1, 3, 50])
    )
    now, flying = 0.0, list[Sent]()
    for _ in range(2000):
        tokens = rng.choice([0, 1, 500, 10**7])
        wait_s = pace.wait_s(tokens, now)
        assert wait_s >= 0
        if wait_s == 0:
            flying.append(pace.send(tokens, now))
        elif not flying:
            assert wait_s < math.inf
            now += wait_s
        if flying and (wait_s or rng.random() < 0.5):
            sent = flying.pop(rng.randrange(len(flying)))
            limit = rng.choice([0, 1, 2, 600, 10**6])
            kinds: tuple[Literal["requests", "tokens"], ...] = ("requests", "tokens")
            left = rng.choice([-1, 0, limit // 2, limit, limit + 5])
            readings = [Reading(of, limit, left, rng.choice([None, 0.0, 1e-6, 1.0, 3600.0])) for of in kinds if rng.random() < 0.5]
            end = rng.random()
            if end < 0.5:
                pace.heard(sent, now, readings, tokens=rng.choice([0, sent.tokens]))
            elif end < 0.8:
                pace.refused(sent, now, readings, rng.choice([None, 0.0, 5.0]))
            else:
                pace.failed(sent, now)
        now += rng.choice([0.0, 0.0, 0.01, 3.0])
        assert pace.in_flight == len(flying)
        assert pace.describe()


def test_a_limit_a_minute_that_is_kept_in_a_smaller_bucket_is_seen_for_what_it_is() -> None:
    """600 a minute are told, and of them 9 are left after the first request: full again in 100 ms, it holds 10."""
    pace = fresh(concurrency=100)
    pace.heard(pace.send(1, 0.0), 0.1, [Reading("requests", 600, 9, 0.1)], tokens=1)
    burst = 0
    while pace.wait_s(1, 0.2) == 0:
        pace.send(1, 0.2)
        burst += 1
    assert burst <= 9
    assert pace.wait_s(1, 0.2) > 0


def test_headers_that_lead_from_refusal_to_refusal_are_not_followed_for_ever() -> None:
    pace = fresh(concurrency=4)
    pace.heard(pace.send(1, 0.0), 0.1, [Reading("requests", 600, 500, 0.01)], tokens=1)
    now, refused = 0.1, 0
    while now < 20:
        now += min(1.0, pace.wait_s(1, now))
        if pace.wait_s(1, now) == 0:
            pace.refused(pace.send(1, now), now + 0.01, [Reading("requests", 600, 0, 0.01)], None)
            now, refused = now + 0.01, refused + 1
    assert refused < 60
