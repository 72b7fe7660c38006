"""Random calls, right and wrong: the corpus ends as it did, other seeds in the right answer or a clear error."""

from __future__ import annotations

import json

import fuzz
import pytest

ENDINGS = json.loads(fuzz.CORPUS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", range(8))
def test_the_corpus_ends_as_it_did(part):
    for seed, ending in list(ENDINGS.items())[part::8]:
        assert fuzz.outcome(*fuzz.make_call(int(seed))) == ending, f"python tests/fuzz.py --seed {seed}"


CALLS = [(first, 50) for first in range(10_000_000, 10_000_400, 50)]
MORE = [pytest.param(first, 500, marks=pytest.mark.exhaustive) for first in range(10_000_400, 10_010_400, 500)]


@pytest.mark.parametrize(("first", "count"), CALLS + MORE)
def test_other_calls_have_the_right_answer_or_a_clear_error(first, count):
    for seed in range(first, first + count):
        try:
            fuzz.outcome(*fuzz.make_call(seed))
        except Exception as error:
            raise AssertionError(f"python tests/fuzz.py --seed {seed}") from error


def test_the_corpus_has_many_endings():
    assert len(set(ENDINGS.values())) == len(ENDINGS) > 200
    assert "right" in ENDINGS.values()
    assert sum(ending.startswith(("ValueError: ", "TypeError: ")) for ending in ENDINGS.values()) > 50
