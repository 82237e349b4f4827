"""Reads the equations in a worked answer and says of each whether it holds: exact rationals, and rounding as it is written.

What is read: numbers with signs, decimals, thousands separators and percent, mixed numbers, + - * / ^, brackets, "x", "×" and "times",
LaTeX's fractions and signs, currency signs, units after numbers, and GSM8K's calculator marks <<48/2=24>> (Cobbe et al. 2021, arXiv
2110.14168).

An equation that can't be read whole is left alone, since a false alarm costs a good row: unknowns, functions, times of day, ratios,
ranges, sums of unlike units. So is a text's reasoning: 5*60 may be right, and the wrong thing to compute. Percent is read in every way
in which people write it (60% as 0.6 or as 60; 20 - 10% as 18), and one that holds is enough.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

DIGITS = 40  # of a number that is read
TERMS = 400  # tokens of one side that is read
BITS = 4096  # of a power that is computed
APPROXIMATELY = Fraction(1, 20)  # how far "≈" may be off
EITHER = Fraction(1, 200)  # how far two sides that are both computed may differ: their decimals were rounded before

# Measures, in the singular, and how many of a smaller one a greater one has.
_MEASURES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("second", "minute", "hour", "day", "week", "month", "year"), (60, 3600, 24, 7, 30, 12, 52, 365)),
    **dict.fromkeys(("foot", "feet", "inch", "inche", "yard", "mile"), (12, 3, 36, 5280)),
    **dict.fromkeys(("km", "m", "cm", "mm", "meter", "metre", "kilometer", "kilometre", "centimeter"), (10, 100, 1000)),
    **dict.fromkeys(("kg", "g", "gram", "kilogram", "liter", "litre", "l", "ml"), (1000,)),
    **dict.fromkeys(("pound", "ounce", "gallon", "quart", "pint", "cup"), (16, 4, 2)),
    **dict.fromkeys(("$", "cent", "quarter", "dime", "nickel", "penny", "pennie"), (100, 4, 10, 20)),
    "dozen": (12,),
}


@dataclass(frozen=True)
class Equation:
    """One `=`: as written, whether it holds, what the left side gives, and the readings of the right side."""

    text: str
    holds: bool
    gives: Fraction
    results: tuple[Fraction, ...]


@dataclass(frozen=True)
class Steps:
    """The equations of a text that could be read, and the readings of the last one's result (none: empty)."""

    equations: tuple[Equation, ...]
    last: tuple[Fraction, ...]


def steps(text: str) -> Steps:
    """The equations of a text in order; linear in its length."""
    found: list[Equation] = []
    last: tuple[Fraction, ...] = ()
    for line in _lines(text):
        if "=" not in line and "≈" not in line:
            continue
        marks = [(mark, _of_mark(mark[1], line[mark.end() : mark.end() + DIGITS])) for mark in _MARK.finditer(line)]
        inside = [equation for _, equations in marks for equation in equations]
        outside = _of_line(_MARK.sub("", line))
        found += [*outside, *inside]
        last = tuple(r for equations in (inside, outside) for equation in equations[-1:] for r in equation.results) or last
    return Steps(tuple(found), last)


def values(text: str) -> tuple[Fraction, ...]:
    """The readings of an answer that is one number or computes to one: "1,000", "$42.50", "3 1/2", "50%", "12 apples"; else empty."""
    lines = list(_lines(text))
    if len(lines) != 1 or len(text) > 500:
        return ()
    tokens = _tokens(lines[0].strip().rstrip(".").replace("≈", "").strip())
    if not tokens or any(token.kind in "=?" for token in tokens):
        return ()
    words = [i for i, token in enumerate(tokens) if token.kind == "w"]
    if words and (
        words[-1] - words[0] + 1 != len(words) or words[-1] != len(tokens) - 1 or not words[0] or tokens[words[0] - 1].text == "/"
    ):
        return ()  # a number, and then the words for what it counts; nothing else
    if words and tokens[words[0]].start == tokens[words[0] - 1].end and len(tokens[words[0]].text) == 1:
        return ()  # 3x
    side = tokens[: words[0]] if words else tokens
    return _readings(side)


_FRACTION = re.compile(r"(?<![\d.])(\d{1,40})?\s*\\[dtc]?frac\s*\{([^{}]{1,200})\}\s*\{([^{}]{1,200})\}")
_MARK = re.compile(r"<<([^<>\n]{1,400})>>")
_WRITTEN = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\\\\", "\n"),
        (r"\\(?:text|mathrm|textbf|mathbf|mbox|boxed|fbox)\s*\{([^{}\n]{0,400})\}", r" \1 "),
        (r"\{,\}", ","),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])|[×·⋅∗✕]", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"\\(?:approx|simeq)(?![A-Za-z])|[≃≅]", "≈"),
        (r"\\(?:left|right|quad|qquad)(?![A-Za-z])|\\[()\[\],;:! ]", " "),
        (r"\\([%$])", r"\1"),
        (r"[\u2212\u2013]", "-"),
        (r"\u00b2", "^2"),
        (r"\u00b3", "^3"),
        (r"\^\{(\d{1,3})\}", r"^\1"),
        (r"(?<=[\d)])(\s?)\*\*\1(?=[\d(])", "^"),
        (r"\*\*", " "),
        (r"[&\u00a0\u202f]", " "),
        (r"[!<>:=]=+|=+[<>]|[<>≤≥≠]", "\x01"),
        (r"(?<=[\d%)])\s{0,3}[xX]\s{0,3}(?=[\d.$€£])|(?<=[\d%)])\s{1,3}[xX]\s{1,3}(?=\()", "*"),
        (r"(?<=%)\s{1,3}of\s{1,3}(?=[\d.$€£(])|(?<=\d/\d)\s{1,3}of\s{1,3}(?=[\d.$€£(])", " ⨂ "),
        (r"\b(?:times|multiplied by)\b(?=\s{1,3}[\d.$€£(])", "*"),
        (r"\bdivided by\b(?=\s{1,3}[\d.$€£(])", "/"),
        (r"\bplus\b(?=\s{1,3}[\d.$€£(])", "+"),
        (r"\bminus\b(?=\s{1,3}[\d.$€£(])", "-"),
        (r"\b(?:equals|is equal to)\b", "="),
    )
]
_SIGNS = re.compile(
    r"[\\{}&×·⋅∗✕÷≃≅\u2212\u2013\u00b2\u00b3^*\u00a0\u202f<>:!≤≥≠]|==|[xX]|\bof\b|times|multiplied|divided|plus|minus|equal"
)


def _lines(text: str) -> list[str]:
    """The lines of a text with its signs as one-letter signs; marks stay as they are."""
    marks = _MARK.findall(text)
    text = _MARK.sub("\x02", text)
    if _SIGNS.search(text):
        for _ in range(3):  # fractions in fractions
            text = _FRACTION.sub(_mixed, text)
        for pattern, put in _WRITTEN:
            text = pattern.sub(put, text)
    if marks:
        of = iter(marks)
        text = re.sub("\x02", lambda _: f"<<{next(of, '')}>>", text)
    return text.split("\n")


def _mixed(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    return f"({whole}+({above})/({below}))" if whole else f"(({above})/({below}))"


@dataclass
class _Token:
    """kind: n(umber), o(perator), ( and ), =, w(ord), ? (anything else). `unit`: what stands around a number, in the singular."""

    kind: str
    text: str
    start: int
    end: int
    value: Fraction = Fraction(0)
    decimals: int = 0
    percent: bool = False
    units: list[str] = field(default_factory=list)


_TOKEN = re.compile(
    r"(?P<n>(?P<money>[$€£]\s{0,2})?(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)(?P<percent>\s?%)?)"
    r"|(?P<w>[^\W\d_]\w*(?:['’-][^\W\d_]+)*)|(?P<o>[-+*/^⨂])|(?P<open>[(\[])|(?P<close>[)\]])|(?P<e>[=≈])|(?P<space>\s+)|(?P<other>.)"
)
_KINDS = {"n": "n", "w": "w", "o": "o", "open": "(", "close": ")", "e": "=", "other": "?"}
_NO_UNIT = re.compile(
    "and|or|is|are|was|were|so|then|if|the|for|to|in|at|with|has|have|had|of|on|from|he|she|it|they|we|which|that|by", re.IGNORECASE
)


def _tokens(line: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _TOKEN.finditer(line):
        group = match.lastgroup
        if group is None or group == "space":
            continue
        token = _Token(_KINDS[group], match[0], match.start(), match.end())
        if group == "n":
            digits = re.sub(r"[^\d.]", "", match[0])
            if len(digits) > DIGITS:
                token.kind = "?"
            else:
                token.value = Fraction(f"0{digits}")
                token.decimals = len(digits.partition(".")[2])
                token.percent = match["percent"] is not None
                token.units = ["$"] if match["money"] else []
        tokens.append(token)
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):  # "5 packs x 10 cards"
        if token.text in ("x", "X") and before.kind == "w" and after.kind == "n" and before.end < token.start and token.end < after.start:
            token.kind, token.text = "o", "*"
    return _with_units(tokens)


def _with_units(tokens: list[_Token]) -> list[_Token]:
    """The tokens without the words that only say what a number counts: "5 packs * 10 cards =", "3 hours/day *"."""
    kept: list[_Token] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        kept.append(token)
        i += 1
        if token.kind != "n":
            continue
        j = i
        while j < len(tokens) and j < i + 5:
            if tokens[j].kind == "w" and not _NO_UNIT.fullmatch(tokens[j].text):
                j += 1
            elif tokens[j].text == "/" and j + 1 < len(tokens) and tokens[j + 1].kind == "w" and not _NO_UNIT.fullmatch(tokens[j + 1].text):
                j += 2
            else:
                break
        words = tokens[i:j]
        glued = bool(words) and words[0].start == token.end and len(words[0].text) == 1 and words[0].kind == "w"  # 3x
        after = tokens[j] if j < len(tokens) else None
        if words and not glued and after is not None and after.kind in "o)=" and not _before_word(tokens, j):
            token.units += [_singular(word.text) for word in words if word.kind == "w"]
            i = j
    return kept


def _before_word(tokens: list[_Token], i: int) -> bool:
    return tokens[i].kind == "o" and (i + 1 >= len(tokens) or tokens[i + 1].kind not in "n(")


def _singular(word: str) -> str:
    word = word.lower()
    word = word[:-1] if word.endswith("s") and len(word) > 2 else word
    return "$" if word in ("dollar", "usd", "buck") else word


def _of_mark(text: str, after: str) -> list[Equation]:
    """What a calculator mark says, and whether the number written behind it is the same."""
    parts = text.split("=")
    found = []
    for left, right in pairwise(parts):
        equation = _equation(_tokens(_lines(left)[0]), _tokens(_lines(right)[0]), f"{left.strip()}={right.strip()}")
        if equation is not None:
            found.append(equation)
    told = re.match(r"\s?[$€£]?\s?(-?(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|-?\.\d+)(%?)(?![\w/*^,:])", after)
    if found and told:
        result = found[-1].results
        behind = _tokens(told[0].strip())
        same = any(_near(value, one, token.decimals) for token in behind if token.kind == "n" for value in result for one in _number(token))
        if not same:
            found.append(Equation(f"<<{text.strip()}>>{told[0].strip()}", False, result[0], result))
    return found


def _of_line(line: str) -> list[Equation]:
    tokens = _tokens(line)
    signs = [i for i, token in enumerate(tokens) if token.kind == "="]
    found = []
    for k, i in enumerate(signs):
        left = _left(tokens, signs[k - 1] + 1 if k else 0, i, line)
        right = _right(tokens, i + 1, signs[k + 1] if k + 1 < len(signs) else len(tokens), line)
        if left is None or right is None or (len(left) == 1 and len(right) == 1):
            continue
        text = line[left[0].start : right[-1].end].replace("⨂", "of")
        what = next((t for t in tokens[i + 1 :] if t.end > right[-1].end), None)
        unit = _singular(what.text) if what is not None and what.kind == "w" and not _NO_UNIT.fullmatch(what.text) else None
        equation = _equation(left, right, text, unit, roughly=tokens[i].text == "≈")
        if equation is not None and not equation.holds and (short := _broken_off(right, goes_on=k + 1 < len(signs))):
            equation = _equation(left, short, text, unit)
        if equation is not None:
            found.append(equation)
    return found


def _broken_off(right: list[_Token], *, goes_on: bool) -> list[_Token]:
    """The result in a right side that runs on: "5 * 12 = 60 + 7 = 67", "1 - 2/3 = 1/3 of 150"; empty where it does not."""
    cut = next((j for j, token in enumerate(right) if token.text == "⨂"), 0)
    if not cut and goes_on and len(right) > 2 and right[0].kind == "n" and right[1].kind == "o":
        cut = 1
    return right[:cut]


def _left(tokens: list[_Token], first: int, sign: int, line: str) -> list[_Token] | None:
    """The longest readable run of tokens that ends before the equals sign, or None where something before it belongs to it."""
    i = sign
    while i > first and tokens[i - 1].kind in "no()" and sign - i < TERMS:
        i -= 1
    run = tokens[i:sign]
    depth, start = 0, 0
    for j in range(len(run) - 1, -1, -1):  # up to the bracket that is open
        depth += (run[j].kind == ")") - (run[j].kind == "(")
        if depth < 0:
            start = j + 1
            break
    opened = start > 0
    run, i = run[start:], i + start
    for j in range(len(run) - 1, 0, -1):  # "1. 5 + 3", "1) 5 + 3"
        if run[j].kind == "n" and run[j - 1].kind in "n)" and not _is_mixed(run, j - 1):
            if run[j - 1].kind == "n" and line[run[j - 1].end : run[j].start].strip() == "":
                return None
            run, i = run[j:], i + j
            break
    if not run:
        return None
    at_start = not line[: run[0].start].strip(" \t>•#|")
    if run[0].kind == "o":
        if run[0].text in "-+*" and at_start and len(run) > 1 and run[1].start > run[0].end:  # a list
            return run[1:]
        if run[0].text not in "-+" or not (opened or i == first or _is_sign(run, line)):
            return None
    if opened or i <= first:
        return run
    before, gap = tokens[i - 1], line[tokens[i - 1].end : run[0].start]
    if before.kind == "w":
        unlike = any(token.units for token in run if token.kind == "n") and i - 2 >= first and tokens[i - 2].kind == "n"
        return None if not gap or unlike else run
    if before.kind == "?":
        digit = before.start > 0 and line[before.start - 1].isdigit() and not gap
        return None if digit or before.text in "\\_{}\x01~@%'" else run
    return run if before.kind == ")" and gap else None


def _is_sign(run: list[_Token], line: str) -> bool:
    """Whether the operator that a run begins with is a sign: " -5" and not " - 5"."""
    at = run[0].start
    return len(run) > 1 and run[1].start == run[0].end and (at == 0 or not line[at - 1].isalnum())


def _right(tokens: list[_Token], first: int, end: int, line: str) -> list[_Token] | None:
    """The longest readable run of tokens after the equals sign, or None where something behind it belongs to it."""
    i = first
    while i < end and tokens[i].kind in "no()" and i - first < TERMS:
        i += 1
    run = tokens[first:i]
    depth = 0
    for j, token in enumerate(run):
        spaced = token.kind == "(" and j > 0 and run[j - 1].kind in "n)" and token.start > run[j - 1].end
        depth += (token.kind == "(") - (token.kind == ")")
        if depth < 0 or (spaced and depth == 1):  # "= 35 (7 more)", "(5 + 3 = 8)"
            return _whole(run[:j])
    while run and depth > 0:  # "= 35 (of"
        depth -= run[-1].kind == "("
        depth += run[-1].kind == ")"
        run = run[:-1]
    after = tokens[first + len(run)] if first + len(run) < len(tokens) else None
    if run and run[-1].kind == "o":
        unit = run[-1].text == "/" and after is not None and after.kind == "w"
        emphasis = run[-1].text == "*" and (after is None or after.start > run[-1].end or after.kind == "?")
        if not unit and not emphasis:
            return None
        return _whole(run[:-1])
    if not run or after is None:
        return _whole(run)
    gap = line[run[-1].end : after.start]
    if after.kind == "w":
        glued = not gap and len(after.text) == 1
        return None if glued or re.fullmatch("r|rem|remainder", after.text, re.IGNORECASE) else _whole(run)
    if after.kind == "?":
        digit = not gap and after.end < len(line) and line[after.end].isdigit()
        return None if digit or after.text in "\\_{}\x01~" else _whole(run)
    return _whole(run)


def _whole(run: list[_Token]) -> list[_Token] | None:
    return run or None


def _equation(left: list[_Token], right: list[_Token], text: str, unit: str | None = None, *, roughly: bool = False) -> Equation | None:
    """Whether both sides can be the same; None where one can't be read."""
    gives, results = _readings(left), _readings(right)
    if not gives or not results:
        return None
    single = [token for token in right if token.kind == "n"] if sum(token.kind in "n(" for token in right) == 1 else []
    holds = any(_same(one, other, single[0] if single else None, roughly=roughly) for one in gives for other in results)
    if not holds:
        numbers = [token for token in left if token.kind == "n"]
        units = {word for token in numbers for word in token.units}
        ends = {word for token in right if token.kind == "n" for word in token.units} | ({unit} if unit else set())
        factors = {factor for word in ends | (units - {"$"}) for factor in _MEASURES.get(word, ())}
        if any(_ratio(one, other) in factors for one in gives for other in results):
            return None  # 30 + 30 = 1 hour
        if units - {"$"} or (units and ends - units):
            sums = any(token.kind == "o" and token.text in "+-" for token in left)
            kinds = {tuple(sorted(token.units)) for token in numbers}
            other = bool(ends) and not ends & units and (units != {"$"} or bool(ends & _MEASURES.keys()))
            if (sums and len(kinds) > 1) or other:
                return None  # unlike things
    return Equation(text.strip(), holds, gives[0], results)


def _ratio(one: Fraction, other: Fraction) -> Fraction | None:
    if not one or not other:
        return None
    return max(one / other, other / one)


def _same(one: Fraction, other: Fraction, written: _Token | None, *, roughly: bool) -> bool:
    off = abs(one - other)
    if roughly and off <= APPROXIMATELY * abs(other):
        return True
    if written is None:
        return off <= EITHER * abs(other) if one.denominator != 1 or other.denominator != 1 else not off
    decimals = written.decimals + (2 if written.percent and abs(other) != written.value else 0)
    return _near(one, other, decimals)


def _near(one: Fraction, other: Fraction, decimals: int) -> bool:
    """Whether a value is another one rounded to so many decimals, or cut off there."""
    off, unit = abs(one - other), Fraction(1, 10**decimals)
    return off <= unit / 2 or (decimals > 0 and off < unit and abs(other) < abs(one))


def _readings(run: list[_Token]) -> tuple[Fraction, ...]:
    """What a side can mean: percent as hundredths, as a mere sign, and taken off or put onto what stands before it; () if nothing."""
    ways = ("hundredths", "sign", "of") if any(token.percent for token in run) else ("hundredths",)
    found = [value for tokens in (run, *_tight(run)) for way in ways if (value := _computed(tokens, way)) is not None]
    return tuple(dict.fromkeys(found))


def _tight(run: list[_Token]) -> list[list[_Token]]:
    """The other reading of "25 / 1/3": what is written without a space belongs together. Empty where there is no other."""
    close = [
        i for i in range(2, len(run) - 1) if run[i].text == "/" and run[i - 2].text == "/" and run[i - 1].kind == run[i + 1].kind == "n"
    ]
    close = [i for i in close if run[i - 1].end == run[i].start and run[i].end == run[i + 1].start and run[i - 2].end < run[i - 1].start]
    if not close:
        return []
    tokens = list(run)
    for i in reversed(close):
        if not run[i + 1].value:
            return []
        tokens[i - 1 : i + 2] = [_Token("n", "", run[i - 1].start, run[i + 1].end, run[i - 1].value / run[i + 1].value)]
    return [tokens]


def _number(token: _Token) -> tuple[Fraction, ...]:
    return (token.value / 100, token.value) if token.percent else (token.value,)


_ORDER = {"+": 1, "-": 1, "*": 2, "⨂": 2, "/": 2, "~": 3, "^": 4}


def _computed(run: list[_Token], way: str) -> Fraction | None:
    """The value of a run of tokens, by operator precedence (shunting-yard, so that depth costs no recursion); None if it is no term."""
    stack: list[Fraction] = []
    operators: list[str] = []

    def reduce() -> bool:
        sign = operators.pop()
        if sign == "(" or len(stack) < (1 if sign == "~" else 2):
            return False
        b = stack.pop()
        if sign == "~":
            stack.append(-b)
            return True
        value = _apply(stack.pop(), sign, b)
        if value is None:
            return False
        stack.append(value)
        return True

    def push(sign: str) -> bool:
        while operators and operators[-1] != "(" and (_ORDER[operators[-1]], sign != "^") > (_ORDER[sign], False):
            if _ORDER[operators[-1]] < _ORDER[sign] or not reduce():
                return _ORDER[operators[-1]] < _ORDER[sign] if operators else False
        operators.append(sign)
        return True

    operand = True  # whether one is due
    i = 0
    while i < len(run):
        token = run[i]
        if token.kind == "n":
            if not operand:
                return None
            if _is_mixed(run, i):
                part = run[i + 3].value
                if not part:
                    return None
                stack.append(token.value + run[i + 1].value / part)
                i += 4
                operand = False
                continue
            value = token.value
            if token.percent and way != "sign":
                value /= 100
                if way == "of" and operators and operators[-1] in "+-" and len(stack) == 1 and i == len(run) - 1:
                    value *= stack[-1]
            stack.append(value)
            operand = False
        elif token.kind == "(":
            if not operand and (token.start > run[i - 1].end or not push("*")):
                return None
            operators.append("(")
            operand = True
        elif token.kind == ")":
            if operand:
                return None
            while operators and operators[-1] != "(":
                if not reduce():
                    return None
            if not operators:
                return None
            operators.pop()
        elif operand:
            if token.text not in "+-" or (operators and operators[-1] == "~"):
                return None
            if token.text == "-":
                operators.append("~")
        else:
            if not push(token.text):
                return None
            operand = True
        i += 1
    if operand:
        return None
    while operators:
        if not reduce():
            return None
    return stack[0] if len(stack) == 1 else None


def _is_mixed(run: list[_Token], i: int) -> bool:
    """Whether 2 1/2 stands at a place: a whole number, a space, and a proper fraction."""
    if i + 3 >= len(run) or [token.kind for token in run[i : i + 4]] != ["n", "n", "o", "n"] or run[i + 2].text != "/":
        return False
    whole, above, below = run[i], run[i + 1], run[i + 3]
    plain = not any(token.decimals or token.percent for token in (whole, above, below))
    return plain and above.value < below.value and above.start == whole.end + 1 and below.start == above.end + 1


def _apply(a: Fraction, sign: str, b: Fraction) -> Fraction | None:
    if sign == "+":
        return a + b
    if sign == "-":
        return a - b
    if sign in "*⨂":
        return a * b
    if sign == "/":
        return a / b if b else None
    size = max(a.numerator.bit_length(), a.denominator.bit_length())
    if b.denominator != 1 or abs(b) * size > BITS or (not a and b < 0):
        return None
    return Fraction(a**b.numerator)
