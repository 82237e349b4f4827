import math
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from importlib import metadata

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data import providers
from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import ClauseEquals, ModelInfo, ModelPrice, Provider, TimeOfDateConstraint
from hypothesis import given
from hypothesis import strategies as st

from factory.prices import cost, find_price, version, worst_cost
from factory.teacher import Price
from schemas.call import Reply


def reply(tokens_in: int, tokens_out: int, cached: int = 0, written: int = 0) -> Reply:
    return Reply(text="", finish="stop", tokens_in=tokens_in, tokens_out=tokens_out, tokens_cached=cached, tokens_to_cache=written)


def by_package(provider: str, model: str, said: Reply, *, batch: bool = False) -> int:
    usage = Usage(
        input_tokens=said.tokens_in,
        output_tokens=said.tokens_out,
        cache_read_tokens=said.tokens_cached,
        cache_write_tokens=said.tokens_to_cache,
    )
    context = {"processing": "batch"} if batch else None
    return math.ceil(calc_price(usage, model, provider_id=provider, price_context=context).total_price * 1_000_000)


KNOWN = [
    ("openai", "gpt-4o-mini"),
    ("openai", "gpt-4o-mini-2024-07-18"),
    ("openai", "ft:gpt-4o-mini-2024-07-18:us::abc"),
    ("openai", "gpt-5.5"),
    ("anthropic", "claude-haiku-4-5-20251001"),
    ("anthropic", "claude-sonnet-4-5"),
    ("azure", "gpt-4o"),
    ("google", "gemini-2.5-pro"),
    ("groq", "openai/gpt-oss-120b"),
]


@pytest.mark.parametrize("said", [reply(1, 0), reply(1234, 567), reply(2000, 100, cached=1500), reply(5000, 90, 1024, 2048)])
@pytest.mark.parametrize(("provider", "model"), KNOWN)
def test_a_reply_costs_what_the_package_itself_makes_of_it(provider, model, said):
    assert cost(find_price(provider, model, said.tokens_in), said) == by_package(provider, model, said) > 0


def test_the_figures_are_the_published_ones():
    assert find_price("openai", "gpt-4o-mini") == Price(
        input_usd_per_mtok=0.15, output_usd_per_mtok=0.6, cached_input_usd_per_mtok=0.075, batch=0.5
    )
    assert find_price("anthropic", "claude-haiku-4-5") == Price(
        input_usd_per_mtok=1, output_usd_per_mtok=5, cached_input_usd_per_mtok=0.1, cache_write_usd_per_mtok=1.25, batch=0.5
    )


@pytest.mark.parametrize(("provider", "model"), KNOWN)
def test_a_batch_costs_what_the_package_makes_of_it(provider, model):
    said = reply(1234, 567)
    assert cost(find_price(provider, model, said.tokens_in), said, batch=True) == by_package(provider, model, said, batch=True)


def test_where_a_batch_halves_cached_tokens_too_their_sum_is_the_packages():
    said = reply(5000, 90, 1024, 2048)
    priced = find_price("anthropic", "claude-haiku-4-5")
    assert cost(priced, said, batch=True) == by_package("anthropic", "claude-haiku-4-5", said, batch=True)


def test_a_batch_that_is_known_to_be_no_cheaper_is_whole():
    assert find_price("openai", "gpt-3.5-turbo-1106").batch == 1


def test_a_batch_of_a_model_without_a_batch_price_is_half_at_openai_and_whole_elsewhere():
    assert find_price("openai", "gpt-4o-2024-11-20").batch == 0.5
    assert find_price("anthropic", "claude-3-haiku-20240307").batch == 0.5
    assert find_price("azure", "gpt-4o").batch == find_price("deepseek", "deepseek-chat").batch == 1


def test_a_long_prompt_pays_the_dearer_tier_and_one_of_unknown_length_the_dearest():
    short, long = find_price("google", "gemini-2.5-pro", 200_000), find_price("google", "gemini-2.5-pro", 200_001)
    assert (short.input_usd_per_mtok, short.output_usd_per_mtok, short.cached_input_usd_per_mtok) == (1.25, 10, 0.125)
    assert (long.input_usd_per_mtok, long.output_usd_per_mtok, long.cached_input_usd_per_mtok) == (2.5, 15, 0.25)
    assert find_price("google", "gemini-2.5-pro") == long
    said = reply(250_000, 100, cached=1000)
    assert cost(long, said) == by_package("google", "gemini-2.5-pro", said)


def test_a_tier_beyond_the_models_window_never_applies():
    assert find_price("anthropic", "claude-sonnet-4-5").input_usd_per_mtok == 3


def test_where_the_hour_decides_the_dearest_hour_counts():
    price = find_price("deepseek", "deepseek-v4-pro")
    model = next(p for p in providers if p.id == "deepseek").find_model("deepseek-v4-pro")
    hours = [model.get_prices(datetime.now(UTC).replace(hour=hour, minute=30)).input_mtok for hour in range(24)]
    assert len(set(hours)) > 1
    assert price.input_usd_per_mtok == float(max(hours))


def test_where_thoughts_are_dearer_than_answers_every_token_may_be_a_thought(monkeypatch):
    told = ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(2), output_reasoning_mtok=Decimal(3))
    model = ModelInfo(id="deep", match=ClauseEquals("deep"), prices=told)
    snapshot = DataSnapshot([Provider(id="thinker", name="", api_pattern="https://nowhere", models=[model])], from_auto_update=False)
    monkeypatch.setattr("factory.prices._snapshot", lambda: snapshot)
    assert find_price("thinker", "deep").output_usd_per_mtok == 3


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-of-tomorrow"),
        ("local", "qwen2.5-7b@1234"),
        ("fake", "fake@1234"),
        ("127.0.0.1:8000", "gpt-4o"),
        ("multimodal:8000", "gpt-4o"),  # a name that the package itself takes for Modal's
        ("my-openai-proxy", "gpt-4o"),
        ("perplexity", "sonar"),  # takes money for each request too
        ("openai", "whisper-1"),  # does not charge by tokens
        ("", ""),
    ],
)
def test_what_is_not_known_is_unknown_and_not_free(provider, model):
    assert find_price(provider, model) is None
    assert cost(None, reply(10, 10)) is None
    assert worst_cost(None, 10, 10) is None


def test_a_provider_may_be_written_as_its_owner_does():
    assert find_price("OpenAI", "GPT-4o-mini") == find_price("openai", "gpt-4o-mini")


def test_a_server_is_found_by_its_address():
    assert find_price("api.deepseek.com", "deepseek-chat") == find_price("deepseek", "deepseek-chat") is not None
    assert find_price("api.deepseek.com:443", "deepseek-chat") == find_price("deepseek", "deepseek-chat")


@pytest.mark.parametrize("batch", [False, True])
def test_no_model_of_the_package_costs_more_than_its_worst(batch):
    """And outside of batches, where one share stands for all prices, exactly what the package says, unless the hour matters."""
    priced = 0
    for provider in providers:
        for model in provider.models:
            for said in [reply(10_000, 1_000), reply(10_000, 1_000, cached=9_000), reply(300_000, 5_000, 1_000, 2_000)]:
                price = find_price(provider.id, model.id, said.tokens_in)
                info = provider.find_model(model.id, all_providers=providers)
                if price is None or (info.context_window and said.tokens_in > info.context_window):
                    continue
                if batch and not any(variant.when == {"processing": "batch"} for variant in info.price_variants or ()):
                    continue  # the package would count the whole price
                told = by_package(provider.id, model.id, said, batch=batch)
                assert told <= worst_cost(price, said.tokens_in, said.tokens_out, batch=batch), (provider.id, model.id, said)
                by_hour = isinstance(info.prices, list) and any(isinstance(p.constraint, TimeOfDateConstraint) for p in info.prices)
                if not batch and not by_hour and info.get_prices(datetime.now(UTC)).output_reasoning_mtok is None:
                    assert cost(price, said) == told, (provider.id, model.id, said)
                priced += 1
    assert priced > (100 if batch else 3000)


def test_sums_are_exact_and_rounded_up_once():
    price = Price(input_usd_per_mtok=0.07, output_usd_per_mtok=0.1)
    assert cost(price, reply(100, 0)) == worst_cost(price, 100, 0) == 7  # in floats 100 * 0.07 is a little more, and would be 8
    assert cost(price, reply(1, 1)) == 1
    assert cost(price, reply(0, 0)) == 0
    assert cost(price, reply(10**15, 0)) == 7 * 10**13
    assert cost(Price(input_usd_per_mtok=1e-7, output_usd_per_mtok=0), reply(10**7, 0)) == 1


def test_cached_tokens_and_cache_writes_have_their_own_price_or_else_that_of_input():
    own = Price(input_usd_per_mtok=3, output_usd_per_mtok=15, cached_input_usd_per_mtok=0.3, cache_write_usd_per_mtok=3.75)
    assert cost(own, reply(1000, 10, cached=600, written=200)) == 200 * 3 + 180 + 750 + 150
    assert cost(own, reply(1000, 10, cached=600, written=200), batch=True) == 840
    assert worst_cost(own, 1000, 10) == 3750 + 150
    assert worst_cost(own, 1000, 10, batch=True) == 1950
    plain = Price(input_usd_per_mtok=3, output_usd_per_mtok=15)
    assert cost(plain, reply(1000, 10, cached=600, written=200)) == worst_cost(plain, 1000, 10) == 3150


def test_a_server_that_counts_more_cached_tokens_than_tokens_pays_nothing_back():
    price = Price(input_usd_per_mtok=3, output_usd_per_mtok=15, cached_input_usd_per_mtok=0)
    assert cost(price, reply(10, 0, cached=500)) == 0


usd = st.floats(0, 1000, allow_subnormal=False) | st.sampled_from([0.07, 0.15, 0.3, 1 / 3])


@given(
    price=st.builds(
        Price,
        input_usd_per_mtok=usd,
        output_usd_per_mtok=usd,
        cached_input_usd_per_mtok=st.none() | usd,
        cache_write_usd_per_mtok=st.none() | usd,
        batch=st.floats(0, 1),
    ),
    plain=st.integers(0, 10**6),
    cached=st.integers(0, 10**6),
    written=st.integers(0, 10**6),
    tokens_out=st.integers(0, 10**6),
    batch=st.booleans(),
)
def test_no_split_of_a_prompt_costs_more_than_the_worst(price, plain, cached, written, tokens_out, batch):
    said = reply(plain + cached + written, tokens_out, cached, written)
    spent = cost(price, said, batch=batch)
    assert spent <= worst_cost(price, said.tokens_in, tokens_out, batch=batch)
    share = Fraction(str(price.batch)) if batch else 1
    at = [price.input_usd_per_mtok if p is None else p for p in (price.cached_input_usd_per_mtok, price.cache_write_usd_per_mtok)]
    rates = [Fraction(str(p)) for p in (price.input_usd_per_mtok, *at, price.output_usd_per_mtok)]
    exact = share * sum(n * rate for n, rate in zip((plain, cached, written, tokens_out), rates, strict=True))
    little = Fraction(1, 10**15)  # a batch's share of a price is rounded at 28 digits
    assert spent - 1 - little < exact <= spent + little


def test_the_version_is_the_installed_one():
    assert version() == f"genai-prices {metadata.version('genai-prices')}"


def test_the_package_is_not_imported_before_a_price_is_asked_for():
    code = "import sys, factory.prices as p; print(p.version(), 'genai_prices' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split()[-1] == "False"
