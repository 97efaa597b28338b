"""The ways to carry a variance, as settings or by their names."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bayesdiff as bd
from bayesdiff.checks import ArgumentError
from bayesdiff.propagation.settings import PROPAGATIONS, settings


def test_names_are_the_defaults():
    found = [settings(name) for name in PROPAGATIONS]
    assert found == [bd.Tangents(), bd.Ensemble(), bd.BayesDiff(), bd.BayesDiff(centered=True)]
    for given in found:
        assert settings(given) is given


def test_settings_are_frozen_and_shown_in_a_line():
    with pytest.raises(dataclasses.FrozenInstanceError):
        bd.Tangents().draws = 3
    assert dataclasses.replace(bd.Tangents(draws=3), refresh=2) == bd.Tangents(draws=3, refresh=2)
    assert "draws=3" in repr(bd.Tangents(draws=3))
    generator = torch.Generator()
    for cls in (bd.Tangents, bd.Ensemble, bd.BayesDiff):
        assert cls(generator=generator, batch_invariant=True, trajectory=True).generator is generator


WRONG = [
    (lambda: bd.Tangents(draws=0), "draws >= 1, got 0"),
    (lambda: bd.Tangents(draws=1.5), "draws to be an integer >= 1, got 1.5"),
    (lambda: bd.Tangents(extra_calls=0), "extra_calls to be finite and > 0, got 0"),
    (lambda: bd.Tangents(extra_calls=float("nan")), "extra_calls"),
    (lambda: bd.Tangents(refresh=0), "refresh >= 1, got 0"),
    (lambda: bd.Tangents(num_directions=0), "num_directions >= 1, got 0"),
    (lambda: bd.Tangents(directions_per_call=0), "directions_per_call >= 1, got 0"),
    (lambda: bd.Tangents(decoder_calls=1), "decoder_calls >= 2, got 1"),
    (lambda: bd.Ensemble(members=1), "members >= 2, got 1"),
    (lambda: bd.BayesDiff(samples=1), "samples >= 2, got 1"),
    (lambda: bd.BayesDiff(skip_interval=0), "skip_interval >= 1, got 0"),
    (lambda: bd.BayesDiff(factors=True), "factors=False for BayesDiff"),
    (lambda: settings("magic"), "'tangents', 'ensemble', 'bayesdiff', 'bayesdiff-centered'.*got 'magic'"),
    (lambda: settings(bd.Tangents), "or bd.Tangents"),
    (lambda: settings(None), "got None"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_out_of_range_is_an_error(number):
    make, message = WRONG[number]
    with pytest.raises(ArgumentError, match=message):
        make()
