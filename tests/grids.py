"""Which cases of a grid of parameters `make test` runs: as few as let each pair of values meet (pairwise testing).

A fault shows where one parameter has a certain value, or two have; that it takes three is rare, and `make test-all`
runs the other cases. With one or two parameters these are none.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence


def covering(cases: Sequence[Mapping[str, Hashable]], strength: int = 2) -> set[int]:
    """Numbers of cases in which all those values, `strength` at a time, meet that meet in any case.

    Of those that add most, the first: not the smallest set there is, but near it and always the same.
    """
    named = [[(name, case[name]) for name in sorted(case)] for case in cases]
    meetings = [set(itertools.combinations(values, min(strength, len(values)))) for values in named]
    met: set[tuple] = set()
    chosen: set[int] = set()
    for new in range(max(map(len, meetings), default=0), 0, -1):
        for number, ours in enumerate(meetings):
            if len(ours - met) >= new:
                chosen.add(number)
                met |= ours
    return chosen
