"""Rows that say the same in other words: the last and finest net, by the cosine of their vectors.

Cosine alone would merge what must stay apart ("I lost my card", "I found my card"; 5 pounds, 50 pounds; "it works", "it does not
work"), so only rows of one label and the same numbers are compared, and none with its denial or its opposite.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.cosine import Mode, settle
from factory.pairs import Link
from factory.stage import Context, Vectors
from filters.twins import Compared, groups, nearest_the_cut, plain, standing, text_of, verdicts

FALLBACK = 0.95
FEWEST_SEEDS = 10
MOST_SEEDS = 2000
AMONG = 100  # seeds among which each one's nearest is sought: among more it is nearer, which says nothing of the embedder
CLIP = (0.85, 0.98)
CLOSEST = 5  # pairs of seeds that are told

# Words that deny. "unable" and "without" are among them, since "can't" and "with no" say the same.
_DENYING = "not never no none nobody nothing nowhere neither nor cannot unable without"
_AUXILIARY = "ai are ca could did do does had has have is must need should was were wo would"
_DENIES = rf"\b(?:{'|'.join(_DENYING.split())}|(?:{'|'.join(_AUXILIARY.split())})n'?t)\b"
_UNSURE = r"\b(?:no idea|(?:do|did)n'?t (?:know|understand)|can(?:'?t|not) (?:figure out|tell|understand)|not sure)\b"  # denies nothing

# A line a pair of opposites, at most 64: rows with words of different sides are not the same, however near their vectors. A bare
# "to" is mostly none of a place.
_OPPOSITES = """
lost lose loses losing misplaced | found find finds finding
in into inside | out outside
on | off
up | down
over above | under below
before earlier | after later afterwards
more most | less fewer least
first | last
with | without
from | to_my to_your to_the to_a to_an to_another to_this to_that
all every always everyone everything | none never nobody nothing
increase increases increased increasing raise raised higher | decrease decreases decreased decreasing reduce reduced lower
enable enables enabled enabling | disable disables disabled disabling
activate activates activated activating active | deactivate deactivates deactivated deactivating inactive
accept accepts accepted accepting | decline declines declined declining reject rejects rejected rejecting refuse refused
allow allows allowed allowing permit permitted | deny denies denied denying forbid forbidden prohibit prohibited
open opens opened opening | close closes closed closing
add adds added adding | remove removes removed removing delete deletes deleted deleting
buy buys bought buying purchase purchased | sell sells sold selling
send sends sent sending | receive receives received receiving
deposit deposits deposited depositing | withdraw withdraws withdrew withdrawn withdrawing withdrawal
start starts started starting begin begins began beginning | stop stops stopped stopping end ends ended ending finish finished
connect connects connected connecting | disconnect disconnects disconnected disconnecting
lock locks locked locking freeze frozen freezing block blocked | unlock unlocks unlocked unlocking unfreeze unfrozen unblock unblocked
subscribe subscribes subscribed subscribing subscription | unsubscribe unsubscribes unsubscribed unsubscribing
install installs installed installing | uninstall uninstalls uninstalled uninstalling
win wins won winning | lose loses lost losing
pass passes passed passing succeed succeeded success successful | fail fails failed failing failure unsuccessful
borrow borrows borrowed borrowing | lend lends lent lending
push pushes pushed pushing | pull pulls pulled pulling
arrive arrives arrived arriving arrival | depart departs departed departing departure leave leaves left leaving
import imports imported importing | export exports exported exporting
encrypt encrypts encrypted encrypting | decrypt decrypts decrypted decrypting
upload uploads uploaded uploading | download downloads downloaded downloading
credit credits credited | debit debits debited
agree agrees agreed agreeing approve approved | disagree disagrees disagreed disagreeing disapprove disapproved
appear appears appeared appearing | disappear disappears disappeared disappearing
like likes liked love loves loved | dislike dislikes disliked hate hates hated
possible | impossible
valid correct right true | invalid incorrect wrong false
complete completed | incomplete
legal | illegal
supported | unsupported
authorised authorized | unauthorised unauthorized
verified | unverified
available | unavailable
known recognised recognized | unknown unrecognised unrecognized
expected | unexpected
paid | unpaid
happy | unhappy
safe secure | unsafe insecure dangerous
good better best | bad worse worst
big bigger large larger | small smaller
long longer | short shorter
high | low
fast faster quick quicker | slow slower
early | late
hot | cold
cheap cheaper | expensive
easy easier | hard harder difficult
old older | new newer
maximum max | minimum min
male man men he his | female woman women she her
"""


def _sides_of_words() -> dict[str, tuple[int, int]]:
    sides: dict[str, tuple[int, int]] = {}
    for bit, line in enumerate(_OPPOSITES.split("\n")[1:-1]):
        for side, words in enumerate(line.split("|")):
            for word in (part.replace("_", " ") for part in words.split()):
                known = sides.setdefault(word, (0, 0))
                sides[word] = (known[0] | (1 - side) << bit, known[1] | side << bit)
    return sides


_SIDES = _sides_of_words()
_SIDE_BITS = np.array(list(_SIDES.values()), np.uint64)
_PLACE = {word: place for place, word in enumerate(_SIDES)}
_HAS_SIDE = rf"\b(?:{'|'.join(_SIDES)})\b"


class Semantic(Compared):
    """Rejects a row whose vector has a cosine of at least `threshold` to that of a row that stays.

    `threshold: auto` takes it from the seeds: see `calibrate`. `mode: exact` compares all pairs; `fast` misses one in a thousand of those
    just at the threshold, and fewer of closer ones; `auto` is exact up to about 20,000 rows, or 1,000 new ones. What is found is
    never below the threshold. `link: complete` also asks that a row is as alike to all that were rejected for its twin. `score` is the
    highest cosine to a row that stands earlier and stays; by `fast` and by `complete` that is sure of rejected rows only.
    """

    key: ClassVar[str] = "semantic"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "dataset"

    threshold: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = FALLBACK
    mode: Mode = "auto"
    link: Link = "star"
    same_label: bool = Field(True, description="only rows of the same label are compared")
    numbers: bool = Field(True, description="rows whose digits differ are not compared")
    negation: bool = Field(True, description="a row is not compared with one that denies what it says, or says an opposite (English)")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        threshold = self._threshold(ctx)
        rows = standing(samples, ctx, self)
        vectors = ctx.embed(rows["compared"].to_list())
        keys, sides = self._apart(rows, ["label"] if self.same_label else [])
        new = rows["new"].to_numpy()
        stay, twin, likeness = settle(vectors, new, threshold, keys=keys, sides=sides, mode=self.mode, link=self.link)
        ctx.progress(len(rows), len(rows))
        ctx.report("groups", groups(rows, stay, twin))
        ctx.report("nearest_the_cut", nearest_the_cut(rows, twin, likeness, threshold))
        return verdicts(rows, stay, twin, likeness, "semantic duplicate")

    def _apart(self, rows: pl.DataFrame, alike: list[str]) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        """What keeps rows apart, as `factory.cosine.settle` takes it: keys (equal where `alike` and the rest are) and sides."""
        text, sides = plain(pl.col("compared")), np.zeros((len(rows), 2), np.uint64)
        parts = [pl.col(name) for name in alike]
        if self.numbers:
            parts.append(pl.col("compared").str.extract_all(r"\d+").list.join(" ").alias("numbers"))
        if self.negation:
            parts.append(text.str.replace_all(_UNSURE, "").str.contains(_DENIES).alias("denies"))
            sides = opposites(rows.select(text).to_series())
        first = rows.with_row_index("first").select(pl.col("first").first().over(parts or pl.lit(0))).to_series()
        return first.to_numpy().astype(np.int32), sides

    def _threshold(self, ctx: Context) -> float:
        if self.threshold != "auto":
            return self.threshold
        seeds = (
            ctx.seeds.select("id", "label", compared=text_of(self.compare))
            .sort("id")
            .unique(plain(pl.col("compared")), keep="first", maintain_order=True)
            .head(MOST_SEEDS)
        )
        keys, sides = self._apart(seeds, [])
        apart = keys[:, None] != keys[None, :]
        apart |= (sides[:, None, 0] & sides[None, :, 1]).astype(np.bool_) | (sides[:, None, 1] & sides[None, :, 0]).astype(np.bool_)
        threshold, evidence = calibrate(ctx.embed(seeds["compared"].to_list()), seeds["label"], apart)
        pairs = [{"sample": seeds["id"][i], "twin": seeds["id"][j], "likeness": like} for i, j, like in evidence.pop("pairs", ())]
        ctx.report("threshold", {"chosen": threshold, **evidence, "closest_pairs": pairs})
        return threshold


def opposites(texts: pl.Series) -> NDArray[np.uint64]:
    """Of which pairs of opposites each text (in lower case) says one side: two sets of bits, shape (n, 2). Who says both, says neither."""
    found = pl.DataFrame({"row": np.arange(len(texts)), "word": texts.str.extract_all(_HAS_SIDE)}).explode("word").drop_nulls()
    sides = np.zeros((len(texts), 2), np.uint64)
    np.bitwise_or.at(sides, found["row"].to_numpy(), _SIDE_BITS[found["word"].replace_strict(_PLACE, return_dtype=pl.Int64).to_numpy()])
    return sides & ~(sides[:, :1] & sides[:, 1:])


def calibrate(vectors: Vectors, labels: pl.Series, apart: NDArray[np.bool_] | None = None) -> tuple[float, dict[str, Any]]:
    """A threshold from real rows that are known to be distinct, and the evidence for it.

    It lies above what unrelated rows reach (0.999 quantile over pairs of different labels; over all pairs where there is no second
    label) and above what most real rows reach to their nearest of 100 (0.95 quantile), within 0.85 to 0.98. Pairs that are `apart`,
    shape (n, n), are never compared, and count for neither. Under 10 seeds say nothing: 0.95.

    Evidence: those quantiles; `false_merges`, the share of the unrelated pairs that reach the threshold; `seeds_merged`, how many of all
    seeds reach it to another; `pairs`, the closest (row, row, cosine).
    """
    if len(vectors) < FEWEST_SEEDS:
        return FALLBACK, {"seeds": len(vectors)}
    cosines = vectors @ vectors.T
    if apart is not None:
        cosines[apart] = -1
    code = labels.rank("dense").fill_null(0).to_numpy()
    above = np.triu(np.ones(cosines.shape, np.bool_), 1) & (cosines > -1)
    different = above & (code[:, None] != code[None, :])
    unrelated = cosines[different if different.any() else above]
    quantiles = np.quantile(unrelated, [0.5, 0.99, 0.999]) if len(unrelated) else np.zeros(3)
    np.fill_diagonal(cosines, -1)
    few = np.arange(len(vectors)) * max(1, round(len(vectors) / AMONG)) // len(vectors)
    closest = np.quantile(np.where(few[:, None] == few[None, :], cosines, -1).max(axis=1), [0.5, 0.95, 1])
    threshold = round(float(np.clip(max(quantiles[2], closest[1]), *CLIP)), 4)
    rows, others = np.nonzero(above & (cosines >= np.sort(cosines[above])[-CLOSEST:].min(initial=1)))
    pairs = sorted(zip(rows.tolist(), others.tolist(), cosines[rows, others].tolist(), strict=True), key=lambda pair: -pair[2])[:CLOSEST]
    return threshold, {
        "seeds": len(vectors),
        "unrelated": dict(zip(("q50", "q99", "q999"), quantiles.round(4).tolist(), strict=True)),
        "false_merges": round(float((unrelated >= threshold).mean()), 6) if len(unrelated) else 0.0,
        "closest": dict(zip(("q50", "q95", "max"), closest.round(4).tolist(), strict=True)),
        "seeds_merged": int((cosines.max(axis=1) >= threshold).sum()),
        "pairs": [(row, other, round(cosine, 4)) for row, other, cosine in pairs],
    }
