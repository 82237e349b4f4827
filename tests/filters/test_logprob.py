"""A row that its own teacher found unlikely falls; one that came without the figure stays, and that is said."""

from __future__ import annotations

from filters.logprob import Logprob
from tests.context import FakeContext, chat, frame


def test_rows_fall_below_the_line_and_stay_on_it() -> None:
    rows = frame(chat("fluent", logprob=-0.8), chat("on the line", logprob=-1.5), chat("stumbling", logprob=-1.51), chat("unknown"))
    ctx = FakeContext()
    verdicts = Logprob(at_least=-1.5).judge(rows, ctx)
    found = dict(zip(rows["input"], verdicts["keep"], strict=True))
    assert found == {"fluent": True, "on the line": True, "stumbling": False, "unknown": True}
    assert verdicts["reason"].drop_nulls().to_list() == ["unlikely words"]
    assert verdicts["score"].to_list() == [-0.8, -1.5, -1.51, None]
    assert ctx.reports == {"unknown": "1 of 4 rows of a batch came without log-probabilities"}
