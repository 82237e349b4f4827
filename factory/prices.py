"""What a call costs: published prices by provider and model, and exact sums in whole micro-dollars, so that a budget can be kept.

The prices are those that the installed package genai-prices brings with it. They are never fetched, so that a run costs the
same by the same version, which the manifest names.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from factory.teacher import Price
from schemas.call import Reply

if TYPE_CHECKING:  # the package takes 80 ms to import, which a command without teachers should not wait for
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

PACKAGE = "genai-prices"

# Where the package does not know what a batch costs. Of other providers no discount is assumed.
# https://platform.openai.com/docs/guides/batch, https://docs.claude.com/en/docs/build-with-claude/batch-processing
BATCH_SHARE = {"openai": 0.5, "anthropic": 0.5}

BATCH = {"processing": "batch"}  # the package's own name for it

NOT_TEXT = ("requests_kcount", "output_citation_mtok")  # charged besides the tokens that a Reply counts


def version() -> str:
    """Where the prices come from, as the manifest says it: `genai-prices 0.2.3`."""
    return f"{PACKAGE} {metadata.version(PACKAGE)}"


def find_price(provider: str, model: str, tokens_in: int | None = None) -> Price | None:
    """The published price of a model, by its teacher's identity, as of the day of the first look-up; None: unknown, not zero.

    `provider` is an id of genai-prices or the host of one of its addresses ("api.deepseek.com"). `model` may be dated or an
    alias, as far as the package matches it. Where the price depends on the length of the prompt or on the hour, it is the
    dearest that may apply, so that a budget is never overshot: to a prompt of at most `tokens_in` tokens where that is told,
    else to any that the model's window takes. A model that also charges for other things than tokens is unknown.
    """
    tiers = _tiers(provider, model)
    if not tiers or tokens_in is None:
        return tiers[-1].price if tiers else None
    return next((tier.price for tier in reversed(tiers) if tier.start < tokens_in), tiers[0].price)


def cost(price: Price | None, reply: Reply, *, batch: bool = False) -> int | None:
    """What a reply cost in micro-dollars, rounded up; None: the price is unknown."""
    if price is None:
        return None
    rates = _rates(price, batch)
    plain = max(reply.tokens_in - reply.tokens_cached - reply.tokens_to_cache, 0)
    asked = plain * rates.input + reply.tokens_cached * rates.cached + reply.tokens_to_cache * rates.cache_write
    return -(-(asked + reply.tokens_out * rates.output) // rates.unit)


def worst_cost(price: Price | None, tokens_in: int, tokens_out: int, *, batch: bool = False) -> int | None:
    """The most that so many tokens can cost in micro-dollars, however the prompt cache splits them; None: the price is unknown."""
    if price is None:
        return None
    rates = _rates(price, batch)
    return -(-(tokens_in * max(rates.input, rates.cached, rates.cache_write) + tokens_out * rates.output) // rates.unit)


class _Rates(NamedTuple):
    """A price in whole numbers: `unit` of them are one micro-dollar a token."""

    input: int
    cached: int
    cache_write: int
    output: int
    unit: int


@cache
def _rates(price: Price, batch: bool) -> _Rates:
    # Dollars a million tokens are micro-dollars a token. Decimal, since 100 * 0.07 in floats rounds up to 8.
    def rate(usd_per_mtok: float | None) -> Decimal:
        usd = price.input_usd_per_mtok if usd_per_mtok is None else usd_per_mtok
        return Decimal(str(usd)) * (Decimal(str(price.batch)) if batch else 1)

    asked, answered = rate(price.input_usd_per_mtok), rate(price.output_usd_per_mtok)
    cached, cache_write = rate(price.cached_input_usd_per_mtok), rate(price.cache_write_usd_per_mtok)
    unit = 10 ** max(0, *(-int(r.as_tuple().exponent) for r in (asked, cached, cache_write, answered)))
    return _Rates(int(asked * unit), int(cached * unit), int(cache_write * unit), int(answered * unit), unit)


class _Tier(NamedTuple):
    """The dearest price of prompts that are longer than `start` tokens, and no longer than the next tier's start."""

    start: int
    price: Price


@cache
def _tiers(provider: str, model: str) -> tuple[_Tier, ...]:
    found = _find(provider, model)
    if found is None:
        return ()
    seller, info = found
    # Some models are dearer by day than by night; half past, since an interval may begin at half past.
    hours = [datetime.now(UTC).replace(hour=hour, minute=30) for hour in range(24)]
    usual = [info.get_prices(hour) for hour in hours]
    if any(getattr(price, name) for price in usual for name in NOT_TEXT):
        return ()
    # A model that this provider sells for another has the other's batch prices in the package, which are not this one's.
    own = any(info is model for model in seller.models)
    told = own and any(variant.when == BATCH for variant in info.price_variants or ())
    batch = [info.get_prices(hour, BATCH) for hour in hours] if told else None
    share = BATCH_SHARE.get(seller.id, 1.0)
    starts = {0, *(tier.start for price in usual for tier in getattr(price.input_mtok, "tiers", ()))}
    reached = sorted(start for start in starts if info.context_window is None or start < info.context_window)
    prices = [(start, _price(usual, start, _share(usual, batch, start) if batch else share)) for start in reached]
    return tuple(_Tier(start, price) for start, price in prices if price is not None)


def _find(provider: str, model: str) -> tuple[Provider, ModelInfo] | None:
    snapshot = _snapshot()
    # Not by the package's own guess at names: to it, a server "multimodal:8000" of one's own is Modal's.
    seller = next((p for p in snapshot.providers if p.id == provider.lower()), None)
    try:
        seller = seller or snapshot.find_provider(None, None, f"https://{provider}/")
        return snapshot.find_provider_model(model, seller, None, None)
    except LookupError:
        return None


@cache
def _snapshot() -> DataSnapshot:
    from genai_prices.data import providers
    from genai_prices.data_snapshot import DataSnapshot

    return DataSnapshot(providers=providers, from_auto_update=False)


def _price(usual: Sequence[ModelPrice], start: int, batch: float) -> Price | None:
    def usd(*names: str) -> float | None:
        values = [value for name in names if (value := _dearest(usual, name, start)) is not None]
        return float(max(values)) if values else None

    asked, answered = usd("input_mtok"), usd("output_mtok", "output_reasoning_mtok")
    if asked is None or answered is None:
        return None
    return Price(
        input_usd_per_mtok=asked,
        output_usd_per_mtok=answered,
        cached_input_usd_per_mtok=usd("cache_read_mtok"),
        cache_write_usd_per_mtok=usd("cache_write_mtok"),
        batch=batch,
    )


def _share(usual: Sequence[ModelPrice], batch: Sequence[ModelPrice], start: int) -> float:
    """What a batch costs as a share of the usual price; the larger of its two directions' shares."""
    both = [(_dearest(usual, name, start), _dearest(batch, name, start)) for name in ("input_mtok", "output_mtok")]
    return min(1.0, max((float(less / full) for full, less in both if full and less is not None), default=1.0))


def _dearest(prices: Sequence[ModelPrice], name: str, start: int) -> Decimal | None:
    """The dearest of one kind's prices, for a prompt of `start` tokens and one more, or fewer."""
    values = [_reached(getattr(price, name), start) for price in prices]
    return max((value for value in values if value is not None), default=None)


def _reached(price: Decimal | TieredPrices | None, start: int) -> Decimal | None:
    """The dearest of a price's tiers up to the one from `start` tokens on."""
    if price is None or isinstance(price, Decimal):
        return price
    return max([price.base, *(tier.price for tier in price.tiers if tier.start <= start)])
