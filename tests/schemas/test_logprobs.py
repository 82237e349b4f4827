import base64
import json
import math
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.logprobs import Position, pack, unpack

# Any Unicode, halves of characters too, and pieces as byte-level tokenisers have them.
PIECES = ["", " the", "Ġthe", "▁the", "\n", "<0xF0>", "\\xf0\\x9f", "\ufffd", "🙂", "\ud83d", "\x00"]
TOKENS = st.text(st.characters()) | st.sampled_from(PIECES)
LOGPROBS = st.floats(-10000, 0) | st.floats(-1e-6, 0) | st.just(-0.0)
POSITIONS = st.lists(st.tuples(TOKENS, LOGPROBS, st.lists(st.tuples(TOKENS, LOGPROBS), max_size=20)), max_size=12)


def near(found: float, given: float) -> bool:
    return math.isclose(found, given, rel_tol=2**-11, abs_tol=2**-25)


@settings(deadline=None)  # the machine may be busy
@given(POSITIONS)
def test_what_is_packed_comes_back_within_the_stated_precision(positions: list[Position]) -> None:
    found = unpack(pack(positions))
    assert [(token, [text for text, _ in others]) for token, _, others in found] == [
        (token, [text for text, _ in others]) for token, _, others in positions
    ]
    for (_, logprob, others), (_, given_logprob, given_others) in zip(found, positions, strict=True):
        assert near(logprob, given_logprob)
        assert all(near(a, b) for (_, a), (_, b) in zip(others, given_others, strict=True))


@settings(deadline=None)  # the machine may be busy
@given(POSITIONS)
def test_a_packed_string_is_plain_and_packs_to_itself(positions: list[Position]) -> None:
    packed = pack(positions)
    assert packed.isascii()
    assert json.dumps(packed) == f'"{packed}"'
    assert pack(unpack(packed)) == packed


@pytest.mark.parametrize(("logprob", "kept"), [(-math.inf, -65504.0), (-1e9, -65504.0), (math.nan, -65504.0), (0.0, 0.0)])
def test_what_no_half_float_holds_is_kept_as_the_least(logprob: float, kept: float) -> None:
    assert unpack(pack([("a", logprob, [("b", logprob)])])) == [("a", kept, [("b", kept)])]


def test_more_tokens_than_two_bytes_can_number_are_kept() -> None:
    positions = [(str(n), -1.0, [(f"other {n}", -2.0)]) for n in range(40_000)]
    assert unpack(pack(positions)) == positions


def test_an_answer_is_a_twelfth_of_its_json() -> None:
    chance = random.Random(0)
    words = [chance.choice([" ", ""]) + "".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 9))) for _ in range(2000)]

    def told(word: str, logprob: float) -> dict[str, object]:
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    positions, shown = [], []
    for _ in range(256):
        found = [(chance.choice(words), -chance.expovariate(0.2)) for _ in range(20)]
        positions.append((*found[0], found))
        shown.append({**told(*found[0]), "top_logprobs": [told(*each) for each in found]})
    assert 12 * len(pack(positions)) < len(json.dumps({"content": shown}))


@pytest.mark.parametrize("broken", ["", "l0.abc", "l1.", "l1.%%%", "l1.AAAA", pack([("a", -1.0, [])])[:-8]])
def test_a_string_that_is_none_of_ours_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match="log-probabilities"):
        unpack(broken)


def test_a_string_whose_counts_do_not_agree_is_refused() -> None:
    raw = bytearray(zlib.decompress(base64.b64decode(pack([("a", -1.0, []), ("b", -1.0, [("c", -2.0)])])[3:])))
    raw[12 + 3 * 4 + 3] = 1  # the first position now has an alternative as well
    with pytest.raises(ValueError, match="as many alternatives"):
        unpack("l1." + base64.b64encode(zlib.compress(raw)).decode())


def test_a_string_that_was_cut_inside_is_refused() -> None:
    raw = zlib.decompress(base64.b64decode(pack([("abc", -1.0, [("b", -2.0)])] * 9)[3:]))
    for length in range(len(raw)):
        with pytest.raises(ValueError, match="broken"):
            unpack("l1." + base64.b64encode(zlib.compress(raw[:length])).decode())
