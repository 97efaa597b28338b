"""What a function returns, in whatever form, as one tensor with its tangents before the last clamp."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ImagePipelineOutput
from PIL import Image

from bayesdiff.checks import UnsupportedPipelineError
from bayesdiff.propagation.returned import main_result, returned, values
from bayesdiff.tracing.before_clamp import BeforeClamp
from bayesdiff.tracing.dual import DualNumbers

SHAPE = (2, 3, 4, 5)


def x(*shape):
    return torch.rand(shape or SHAPE, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2  # some outside [0, 1]


def t(value):
    return torch.randn(3, *value.shape, generator=torch.Generator().manual_seed(1))


def pictures(array):
    grey = array.shape[-1] == 1
    return [Image.fromarray(i[..., 0] if grey else i) for i in (array * 255).round().astype(np.uint8)]


def array(v):
    return v.clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


#: How the sample is returned; and the shape of the tangents.
FORMS = {
    "tensor": (lambda v: v, SHAPE),
    "clamped": (lambda v: v.clamp(0, 1), SHAPE),
    "tuple": (lambda v: (v, "and more"), SHAPE),
    "output": (lambda v: ImagePipelineOutput(images=v), SHAPE),
    "dictionary": (lambda v: {"images": v, "other": v.mean()}, SHAPE),
    "list": (lambda v: list(v.clone().unbind(0)), SHAPE),
    "vector": (lambda v: v.flatten(), (120,)),
    "number": (lambda v: v.mean(), ()),
    "array": (array, SHAPE),
    "array-in-output": (lambda v: ImagePipelineOutput(images=array(v)), SHAPE),
    "arrays": (lambda v: [array(v[:1])[0], array(v[1:])[0]], SHAPE),
    "array-of-another-order": (lambda v: v.numpy(), SHAPE),
    "pictures": (lambda v: ImagePipelineOutput(images=pictures(array(v))), SHAPE),
    "pictures-one-by-one": (lambda v: [p for row in v for p in pictures(array(row[None]))], SHAPE),
    "pictures-in-lists": (lambda v: [pictures(array(row[None])) for row in v], (2, 1, 3, 4, 5)),
}


@pytest.mark.parametrize("name", FORMS)
def test_tangents_of_every_form(name):
    form, shape = FORMS[name]
    value, tangents = x(), t(x())
    with DualNumbers() as trace:
        trace.attach(value, tangents)
        output = form(value)
    found = returned(output, trace)
    assert found.tangents.shape == (3, *shape)
    assert found.value.shape == shape
    if name == "number":
        torch.testing.assert_close(found.tangents, tangents.mean((1, 2, 3, 4)))
    else:
        torch.testing.assert_close(found.tangents.reshape(tangents.shape), tangents)
    assert main_result(output) is not None


@pytest.mark.parametrize("name", FORMS)
def test_values_of_every_form(name):
    """Members of an ensemble are compared by them: before the last clamp where a trace knows it, else as they are."""
    form, shape = FORMS[name]
    with BeforeClamp() as trace:
        output = form(x())
    plain, before = values(output, None), values(output, trace)
    assert plain.shape == before.shape == shape
    assert plain.dtype == before.dtype == torch.float64
    if name == "number":
        torch.testing.assert_close(before.float(), x().mean())
        return
    torch.testing.assert_close(before.float().reshape(SHAPE), x())
    clamped = name not in ("tensor", "tuple", "output", "dictionary", "list", "vector", "array-of-another-order")
    expected = x().clamp(0, 1) if clamped else x()
    torch.testing.assert_close(plain.float().reshape(SHAPE), expected, rtol=0, atol=0.5 / 255 if "pict" in name else 0)


def test_grey_pictures():
    with DualNumbers() as trace:
        value = x(2, 1, 4, 5)
        trace.attach(value, t(value))
        output = pictures(array(value))
    assert output[0].mode == "L"
    torch.testing.assert_close(returned(output, trace).tangents, t(x(2, 1, 4, 5)))


def test_what_does_not_depend_on_the_network_is_an_error():
    with DualNumbers() as trace:
        value = x()
        trace.attach(value, t(value))
        float(value.sum())
        lost = torch.from_numpy(value.numpy() * 2)
    for output in (lost, x(), [x()], "text", None, pictures(array(x())), SimpleNamespace(a=1)):
        told = r"depends on the network's output.*numpy at test_returned.py:\d+ in test_"
        with pytest.raises(UnsupportedPipelineError, match=told):
            returned(output, trace)
    with pytest.raises(UnsupportedPipelineError, match="values left PyTorch: none"):
        returned(x(), DualNumbers())
    with pytest.raises(UnsupportedPipelineError, match="tensors, arrays or PIL images, got str"):
        values("text", None)


def test_the_first_result_that_depends_on_the_network_counts():
    with DualNumbers() as trace:
        value = x()
        trace.attach(value, t(value))
        output = ((torch.arange(3), 2 * value), value)
    torch.testing.assert_close(returned(output, trace).tangents, 2 * t(x()))
