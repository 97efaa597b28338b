"""Rows of a network call: how tensors are cut into them and joined again, and a network called row by row."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.tracing.rows import Rows, check_rows, first_tensor, in_rows, number_of_rows, repeated
from tests import cases

ROWS = 3


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- cutting and joining ---


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "listed"),
    [
        ([(4, 3, 5)], [(4, 3, 5)], 4, False),
        ([(4, 3, 5), (4, 2)], [(4, 7)], 4, False),  # two arguments with tangents
        ([(4, 3)], [(2, 3)], 1, False),  # lengths differ: one row
        ([(3, 4)] * 2, [(3, 4)] * 2, 2, True),  # lists, one tensor a row
        ([(3, 4)] * 3, [(3, 4)] * 3, 3, True),
        ([(7,)], [(7,)], 1, False),  # a vector is one row
        ([()], [(4,)], 1, False),
    ],
)
def test_rows_are_cut_and_joined(inputs, outputs, rows, listed):
    given, returned = ([noise(*s, seed=i) for i, s in enumerate(shapes)] for shapes in (inputs, outputs))
    for cut, tensors in zip(Rows.of(given, returned), (given, returned), strict=True):
        assert (cut.number, cut.listed) == (rows, listed)
        packed = cut.pack(tensors)
        assert packed.shape[0] == rows
        assert all(torch.equal(a, b) for a, b in zip(cut.unpack(packed), tensors, strict=True))
        tangents = [torch.stack([x, 2 * x]) for x in tensors]
        both = cut.pack(tangents, lead=1)
        assert both.shape == (rows, 2, packed.shape[1])
        assert torch.equal(both[:, 1], 2 * packed)
        assert all(torch.equal(a, b) for a, b in zip(cut.unpack(both), tangents, strict=True))
        assert packed.numel() == rows * sum(cut.row_shape(i).numel() for i in range(1 if listed else len(tensors)))


def test_a_row_of_the_packed_tensors_is_what_belongs_to_one_sample():
    x, y = noise(4, 3, 5), noise(4, 2, seed=1)
    cut, _ = Rows.of([x, y], [x])
    assert torch.equal(cut.pack([x, y])[2], torch.cat([x[2].flatten(), y[2]]))


def test_rows_that_act_on_each_other_are_one():
    x = noise(4, 3)
    given, _ = Rows.of([x], [x], joined=True)
    assert given.number == 1
    assert given.pack([x]).shape == (1, 12)
    assert torch.equal(given.unpack(given.pack([x]))[0], x)


def test_what_is_by_row_is_repeated():
    x = noise(ROWS, 2)
    assert torch.equal(repeated(x, ROWS, 2), torch.cat([x, x]))
    for other in (noise(ROWS + 1, 2), torch.tensor(3.0), 5, None, "text"):
        assert repeated(other, ROWS, 2) is other


# --- row by row ---


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    other: torch.Tensor


class Network(nn.Module):
    """Every form of argument and of output; each row's output depends on that row of each argument."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.form, self.seen = form, []

    def forward(self, sample, t, cond=None, scale=1.0):
        self.seen.append(len(sample))
        out = sample * scale + t
        if cond is not None:
            out = out + cond["text"].mean(1).view(-1, 1, 1, 1) + sum(c.view(-1, 1, 1, 1) for c in cond["images"])
        if self.form == "tensor":
            return out
        if self.form == "tuple":
            return (out, [2 * out, "kept"])
        return Output(sample=out, other=-out)


def arguments():
    condition = {"text": noise(ROWS, 5, seed=1), "images": [noise(ROWS, seed=2), noise(ROWS, 1, seed=3)], "none": None}
    return noise(ROWS, 1, 4, 4), {"t": torch.tensor(7.0), "cond": condition, "scale": 0.5}


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("form", ["tensor", "tuple", "output"])
def test_every_form_of_arguments_and_outputs(form, as_keyword):
    network, aside = Network(form), Network(form)
    x, kwargs = arguments()
    expected = aside(x, **kwargs)
    forward = in_rows(network.forward)
    got = forward(sample=x, **kwargs) if as_keyword else forward(x, **kwargs)
    assert type(got) is type(expected)
    assert torch.equal(first_tensor(got), first_tensor(expected))
    if form == "tuple":
        assert torch.equal(got[1][0], expected[1][0])
        assert got[1][1] == "kept"
    elif form == "output":
        assert torch.equal(got.sample, expected.sample)
        assert torch.equal(got["other"], expected.other)


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_unet(return_dict):
    """To the last bit what each row gives alone, and to rounding what the batch gives."""
    unet = cases.tiny_unet(channels=1, classes=4)
    x, t, y = noise(4, 1, 8, 8), torch.tensor([5, 300, 999, 1]), torch.tensor([0, 3, 1, 2])
    forward = in_rows(unet.forward)
    with torch.no_grad():
        alone = [unet(x[i : i + 1], t[i : i + 1], class_labels=y[i : i + 1]).sample for i in range(4)]
        batch = unet(x, t, class_labels=y).sample
        got = first_tensor(forward(x, t, class_labels=y, return_dict=return_dict))
        part = forward(x[1:3], t[1:3], class_labels=y[1:3]).sample
    assert torch.equal(got, torch.cat(alone))
    assert torch.equal(part, got[1:3])
    torch.testing.assert_close(got, batch, rtol=0, atol=1e-5)


def test_the_number_of_rows_is_that_of_the_first_tensor():
    x, kwargs = arguments()
    assert number_of_rows((x,), kwargs) == number_of_rows((), {"t": 1, "x": x, "y": noise(5, 5)}) == ROWS
    assert number_of_rows((torch.tensor(3.0), noise(7)), {}) == 1


class Centering(nn.Module):
    def forward(self, sample):
        return sample - sample.mean(0)


class Shared(nn.Module):
    """Its weights happen to have as many elements as there are rows, and are not by row."""

    def forward(self, sample, mix):
        return torch.einsum("i,bjhw->bjhw", mix, sample)


@contextmanager
def refused():
    with pytest.raises(UnsupportedPipelineError, match=r"difference of \S+ \(allowed: \S+\).*batch_invariant=False"):
        yield


def compare(network, *args, **kwargs):
    check_rows(in_rows(network.forward)(*args, **kwargs), network(*args, **kwargs), network)


@pytest.mark.parametrize(("network", "extra"), [(Centering(), {}), (Shared(), {"mix": torch.arange(1.0, ROWS + 1)})])
def test_rows_that_depend_on_each_other_are_refused(network, extra):
    with refused():
        compare(network, noise(ROWS, 1, 4, 4), **extra)


@pytest.mark.parametrize(("size", "context"), [(1e-5, nullcontext), (1e-2, refused)])
def test_a_difference_of_rounding_is_allowed_and_more_is_not(size, context):
    class Off(nn.Module):
        def forward(self, sample):
            return sample * (1 + size * (len(sample) > 1))

    with context():
        compare(Off(), noise(ROWS, 1, 4, 4))
