"""Tensors fit the wire dtype, or their owner hears why they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedsea.errors import UsageError
from fedsea.wire.tensors import gradient_to_wire, to_wire


def test_values_too_large_for_the_wire_dtype_are_the_users_to_know() -> None:
    with pytest.raises(UsageError, match=r"too large for torch\.float16"):
        to_wire(torch.tensor([[1e6]]), torch.float16)
    with pytest.raises(UsageError, match="not finite"):
        to_wire(torch.tensor([[float("nan")]]), torch.float32)


@given(some.integers(-120, 125), some.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_small_gradients_keep_their_digits_in_float16(exponent: int, seed: int) -> None:
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    sent, shift = gradient_to_wire(gradient, torch.float16)
    assert sent.dtype is torch.float16
    assert torch.isfinite(sent).all()
    if exponent > -80:
        torch.testing.assert_close(
            sent.float() * 2.0**-shift, gradient, rtol=1e-3, atol=float(gradient.abs().max()) * 1e-6
        )


def test_a_gradient_of_zeros_and_other_wire_dtypes_are_sent_as_they_are() -> None:
    assert gradient_to_wire(torch.zeros(2, 2), torch.float16)[1] == 0
    for dtype in (torch.float32, torch.bfloat16):
        sent, shift = gradient_to_wire(torch.full((2, 2), 2.0**-90), dtype)
        assert shift == 0
        assert bool((sent.float() == 2.0**-90).all())
