"""The levels of multigrid in channels."""

from __future__ import annotations

import pytest

from lcc.ops.multigrid import Level, levels, why_no_levels


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((64, 32, 32), [(64, 2), (32, 1), (16, 1)]),
        ((64, 8, 8), [(64, 8), (32, 4), (16, 2), (8, 1), (4, 1)]),
        ((64, 64, 64), [(64, 1), (32, 1)]),
        ((16, 32, 32), [(16, 1), (8, 1)]),
        ((40, 16, 16), [(40, 2), (20, 1), (10, 1)]),
        ((24, 16, 16), [(24, 1), (12, 1)]),
        ((160, 64, 64), [(160, 2), (80, 1), (40, 1)]),
        ((2, 1, 2), [(2, 1), (1, 1)]),
    ],
)
def test_widths_halve_to_the_first_below_the_threshold_and_the_last_is_dense(arguments, wanted):
    assert levels(*arguments) == tuple(Level(*pair) for pair in wanted)


def test_groups_divide_a_width_that_halves_along():
    assert levels(32, 8, 32) == (Level(32, 4), Level(16, 1))
    assert levels(32, 8, 32, 6) == (Level(32, 2), Level(16, 1))
    assert levels(32, 4, 16, 12) == (Level(32, 4), Level(16, 2), Level(8, 1))


def test_groups_of_the_finest_level_alone_divide_its_output():
    assert levels(32, 8, 16, first=(34,)) == (Level(32, 2), Level(16, 2), Level(8, 1))


def test_groups_divide_half_the_width_too():
    assert levels(12, 3, 8) == (Level(12, 3), Level(6, 1))
    assert levels(20, 5, 16) == (Level(20, 2), Level(10, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((7, 32), "odd width 7, and"),
        ((50, 8), "odd width 25 (half of 50)"),
        ((24, 32, 73), "odd width 73, and"),
        ((64, 32, 96, 50), "odd width 25 (half of 50)"),
    ],
)
def test_an_odd_width_above_the_coarsest_level_is_refused_in_words(arguments, words):
    assert words in why_no_levels(*arguments)


def test_an_odd_coarsest_width_is_none_of_the_reasons():
    assert why_no_levels(50, 32) is None
    assert why_no_levels(24, 32, 74) is None
