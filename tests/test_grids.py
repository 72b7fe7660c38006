"""The quick part of a grid has every pair of values, in few cases."""

from __future__ import annotations

import itertools

import pytest
from grids import covering

GRID = {"backend": "dtab", "mode": "afo", "labels": "nhs", "views": "12"}
CASES = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("cases", [CASES, CASES[::-1], [x for x in CASES if (x["mode"], x["views"]) != ("o", "1")]])
def test_all_values_meet_that_ever_do(cases, strength):
    for names in itertools.combinations(GRID, strength):
        chosen = {tuple(cases[number][name] for name in names) for number in covering(cases, strength)}
        assert chosen == {tuple(case[name] for name in names) for case in cases}


def test_few_cases_are_enough():
    assert [len(covering(CASES, strength)) for strength in (1, 4)] == [4, len(CASES)]
    assert 12 <= len(covering(CASES, 2)) <= 16  # of 72; one for each backend and mode, or labels, is the least


def test_tables_of_one_or_two_columns_stay_whole():
    assert covering([{"a": i} for i in range(5)]) == set(range(5))
    assert covering([{"a": i, "b": j} for i in range(3) for j in range(4)]) == set(range(12))
    assert covering([]) == set()
