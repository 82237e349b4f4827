"""Whether Markdown is whole: fences and emphasis that are opened are closed, links have an end, and tables as many cells in each row.

After CommonMark 0.31 (https://spec.commonmark.org/0.31.2/) and the tables of GitHub's dialect. What is no fault there but plain text
(a lone star, a bracket) is none here; an opened pair of stars that stays plain text is one, since nobody means it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from factory.kernels import kernel

FAULTS = (
    "",
    "a fence is not closed",
    "a backtick has no partner",
    "a pair of stars has no partner",
    "a link is not closed",
    "rows of a table differ in their cells",
)
FENCE, CODE, BOLD, LINK, TABLE = 1, 2, 3, 4, 5

_NEWLINE, _SPACE, _TAB, _BACKSLASH, _BACKTICK, _STAR, _TILDE, _PIPE = 10, 32, 9, 92, 96, 42, 126, 124


@kernel
def fault(data: Any, start: int, end: int) -> int:
    """The first kind of fault in a text, as a place in `FAULTS`; 0: none. Reads each byte a few times, whatever the text is."""
    fence, fence_length = 0, 0  # the open fence's character, and how many
    paragraph = start
    found = 0
    cells_wanted = 0  # of the table that this line may go on; 0: none
    cells_before = 0
    place = start
    while place < end:
        stop = place
        while stop < end and data[stop] != _NEWLINE:
            stop += 1
        first = place
        while first < stop and (data[first] == _SPACE or data[first] == _TAB or data[first] == 13 or data[first] == 62):  # ">" of a quote
            first += 1
        mark = data[first] if first < stop else 0
        length = 0
        if mark in (_BACKTICK, _TILDE):
            while first + length < stop and data[first + length] == mark:
                length += 1
        if length >= 3:
            if fence == 0:
                inside = False  # ```code``` within a line is no fence
                for k in range(first + length, stop):
                    inside = inside or (mark == _BACKTICK and data[k] == _BACKTICK)
                if not inside:
                    if found == 0:
                        found = _inline(data, paragraph, place)
                    fence, fence_length = int(mark), length
            elif mark == fence and length >= fence_length and _blank(data, first + length, stop):
                fence = 0
                paragraph = stop
            cells_wanted = cells_before = 0
        elif fence == 0:
            if first == stop:  # an empty line ends the paragraph
                if found == 0:
                    found = _inline(data, paragraph, place)
                paragraph = stop
                cells_wanted = cells_before = 0
            else:
                cells = _cells(data, first, stop)
                if cells_wanted:
                    if cells == 0 or (cells == 1 and mark != _PIPE):
                        cells_wanted = 0
                    elif cells != cells_wanted and found == 0:
                        found = TABLE
                elif cells and _rule(data, first, stop):
                    cells_wanted = cells if cells_before else 0
                    if cells_before and cells != cells_before and found == 0:
                        found = TABLE
                cells_before = cells
        place = stop + 1
    if fence:
        return FENCE
    if found == 0:
        found = _inline(data, paragraph, end)
    return found


@kernel
def _blank(data: Any, start: int, end: int) -> bool:
    for place in range(start, end):  # noqa: SIM110 - numba knows no generators
        if data[place] != _SPACE and data[place] != _TAB and data[place] != 13:
            return False
    return True


@kernel
def _cells(data: Any, start: int, end: int) -> int:
    """The cells of a line of a table, whose pipes at both ends may be missing; 0 where it has no pipe."""
    while end > start and (data[end - 1] == _SPACE or data[end - 1] == _TAB or data[end - 1] == 13):
        end -= 1
    pipes, place = 0, start
    while place < end:
        if data[place] == _BACKSLASH:
            place += 1
        elif data[place] == _PIPE:
            pipes += 1
        place += 1
    if pipes == 0:
        return 0
    cells = pipes + 1
    if data[start] == _PIPE:
        cells -= 1
    if end - 1 > start and data[end - 1] == _PIPE and data[end - 2] != _BACKSLASH:
        cells -= 1
    return cells


@kernel
def _rule(data: Any, start: int, end: int) -> bool:
    """Whether a line is the one below a table's head: dashes, colons, pipes."""
    dashes = 0
    for place in range(start, end):
        byte = data[place]
        if byte == 45:
            dashes += 1
        elif byte != _PIPE and byte != 58 and byte != _SPACE and byte != _TAB and byte != 13:
            return False
    return dashes > 0


@kernel
def _wordy(byte: int) -> bool:
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte >= 128 or byte == 95


@kernel
def _inline(data: Any, start: int, end: int) -> int:
    """The first fault within a paragraph."""
    bold = False
    code = 0  # how many backticks opened the span of code; 0: none is open
    code_at = start
    bold_at_code = False
    barren = np.zeros(4, np.int64)  # runs of so many backticks have no partner from there on
    place = start
    found = 0
    while place < end:
        byte = data[place]
        if code:
            if byte != _BACKTICK:
                place += 1
                if place == end:
                    if code == 1 and not _quoted(data, code_at, end):
                        return CODE
                    barren[min(code, 3)] = 1
                    place, code, bold = code_at + code, 0, bold_at_code  # it was no code: read on behind the backticks
                continue
            length = _same(data, place, end)
            place += length
            if length == code:
                code = 0
            elif place == end:
                if code == 1 and not _quoted(data, code_at, end):
                    return CODE
                barren[min(code, 3)] = 1
                place, code, bold = code_at + code, 0, bold_at_code
            continue
        if byte == _BACKSLASH:
            place += 2
        elif byte == _BACKTICK:
            length = _same(data, place, end)
            if barren[min(length, 3)]:
                place += length
            else:
                code, code_at, bold_at_code = length, place, bold
                place += length
                if place == end:
                    if code == 1:
                        return CODE
                    code = 0
        elif byte == _STAR:
            length = _same(data, place, end)
            before = data[place - 1] if place > start else _SPACE
            after = data[place + length] if place + length < end else _SPACE
            if length == 2 and not (_wordy(before) and _wordy(after)):
                opens = _wordy(after) or after == 34 or after == 39 or after == 40 or after == 91 or after == 96 or after == 36
                closes = before != _SPACE and before != _TAB and before != _NEWLINE and before != 40 and before != 47
                if bold and closes:
                    bold = False
                elif opens and not bold and not _wordy(before):
                    bold = True
                elif closes and found == 0 and not opens and after != 47 and before != 42:
                    found = BOLD
            elif length == 3 and (_wordy(before) or _wordy(after)):
                bold = not bold
            place += length
        elif byte == 93 and place + 1 < end and data[place + 1] == 40 and place > start:  # ](
            depth, k = 0, place + 1
            while k < end:
                if data[k] == _BACKSLASH:
                    k += 1
                elif data[k] == 40:
                    depth += 1
                elif data[k] == 41:
                    depth -= 1
                    if depth == 0:
                        break
                k += 1
            if k >= end:
                return LINK
            place = k + 1
        else:
            place += 1
    return BOLD if bold else found


@kernel
def _same(data: Any, place: int, end: int) -> int:
    length = 1
    while place + length < end and data[place + length] == data[place]:
        length += 1
    return length


@kernel
def _quoted(data: Any, start: int, end: int) -> bool:
    """Whether a backtick opens a quotation in the old way, `so'."""
    for place in range(start + 1, end):  # noqa: SIM110
        if data[place] == 39:
            return True
    return False
