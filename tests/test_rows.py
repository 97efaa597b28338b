"""Network calls row by row: the same outputs, whatever form they have."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.rows import in_rows, row_of
from tests import cases

ROWS = 3


def count(args, kwargs):
    return len(args[0] if args else kwargs["sample"])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    with in_rows(network, count, nullcontext):
        got = network(sample=x, **kwargs) if as_keyword else network(x, **kwargs)
    assert type(got) is type(expected)
    if form == "tensor":
        assert torch.equal(got, expected)
    elif form == "tuple":
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1][0], expected[1][0])
        assert got[1][1] == "kept"
    else:
        assert torch.equal(got.sample, expected.sample)
        assert torch.equal(got["other"], expected.other)


def test_row_of():
    x, kwargs = arguments()
    assert torch.equal(row_of(x, ROWS, 2), x[2:])
    row = row_of(kwargs, ROWS, 1)
    assert torch.equal(row["cond"]["text"], kwargs["cond"]["text"][1:2])
    assert row["cond"]["images"][1].shape == (1, 1)
    assert row["t"] is kwargs["t"]
    assert (row["scale"], row["cond"]["none"]) == (0.5, None)
    assert row_of((x, x), ROWS, 0)[1].shape[0] == 1
    other = noise(ROWS + 1, 2)
    assert row_of(other, ROWS, 0) is other


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_unet(return_dict):
    """To the last bit what each row gives alone, and to rounding what the batch gives."""
    unet = cases.tiny_unet(channels=1, classes=4)
    x, t, y = noise(4, 1, 8, 8), torch.tensor([5, 300, 999, 1]), torch.tensor([0, 3, 1, 2])
    call = {"class_labels": y, "return_dict": return_dict}
    with torch.no_grad():
        alone = [unet(x[i : i + 1], t[i : i + 1], class_labels=y[i : i + 1]).sample for i in range(4)]
        batch = unet(x, t, class_labels=y).sample
        with in_rows(unet, count, nullcontext):
            got = unet(x, t, **call)
            part = unet(x[1:3], t[1:3], class_labels=y[1:3]).sample
    got = got.sample if return_dict else got[0]
    assert torch.equal(got, torch.cat(alone))
    assert torch.equal(part, got[1:3])
    torch.testing.assert_close(got, batch, rtol=0, atol=1e-5)


def test_one_check_at_the_first_call_of_several_rows_and_it_is_aside():
    network = Network()
    inside = []

    class Aside:
        def __enter__(self):
            inside.append(len(network.seen))

        def __exit__(self, *_):
            inside.append(len(network.seen))

    x, kwargs = arguments()
    with in_rows(network, count, Aside):
        network(x[:1], torch.tensor(0.0))
        assert (network.seen, inside) == ([1], [])  # one row cannot differ
        network(x, **kwargs)
        network(x, **kwargs)
    assert network.seen == [1, 1, 1, 1, ROWS, 1, 1, 1]
    assert inside == [4, 5]


def test_hooks_see_the_whole_call_and_inner_ones_every_row():
    unet = cases.tiny_unet(channels=1)
    outer, inner = [], []
    unet.register_forward_hook(lambda _, args, out: outer.append(len(out.sample)))
    unet.conv_out.register_forward_hook(lambda _, args, out: inner.append(len(out)))
    with torch.no_grad(), in_rows(unet, count, nullcontext):
        unet(noise(3, 1, 8, 8), 10)
    assert outer == [3]
    assert inner == [1, 1, 1, 3]  # the last is the check


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
@pytest.mark.parametrize("own", [False, True])
def test_forward_is_restored(own, error):
    network = Network()
    if own:
        network.forward = lambda x: 2 * x
    before = network.__dict__.get("forward")
    with pytest.raises(error) if error else nullcontext(), in_rows(network, count, nullcontext):
        assert torch.equal(network(torch.ones(2, 1)), torch.full((2, 1), 2.0)) if own else True
        assert network.__dict__["forward"] is not before
        if error:
            raise error
    assert network.__dict__.get("forward") is before
    assert ("forward" in network.__dict__) == own


class Centering(nn.Module):
    def forward(self, sample):
        return sample - sample.mean(0)


class Shared(nn.Module):
    """Its weights happen to have as many elements as there are rows, and are not by row."""

    def forward(self, sample, mix):
        return torch.einsum("i,bjhw->bjhw", mix, sample)


@pytest.mark.parametrize(("network", "extra"), [(Centering(), {}), (Shared(), {"mix": torch.arange(1.0, ROWS + 1)})])
def test_rows_that_depend_on_each_other_are_refused(network, extra):
    x = noise(ROWS, 1, 4, 4)
    message = r"difference of \S+ \(allowed: \S+\).*batch_invariant=False"
    with pytest.raises(UnsupportedPipelineError, match=message), in_rows(network, count, nullcontext):
        network(x, **extra)
    assert "forward" not in network.__dict__


def test_a_difference_of_rounding_is_allowed_and_more_is_not():
    class Off(nn.Module):
        size = 0.0

        def forward(self, sample):
            return sample * (1 + self.size * (len(sample) > 1))

    network = Off()
    for size, refused in ((1e-5, False), (1e-2, True)):
        network.size = size
        with (
            pytest.raises(UnsupportedPipelineError) if refused else nullcontext(),
            in_rows(network, count, nullcontext),
        ):
            network(noise(ROWS, 1, 4, 4))
