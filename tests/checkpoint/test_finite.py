"""NaN and infinity, found in bits as torch finds them in numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_router_upcycling.checkpoint.format.finite import INFINITY, WORDS, all_finite


@pytest.mark.parametrize("dtype", INFINITY, ids=str)
@given(data=st.data())
def test_as_torch_says(dtype: torch.dtype, data: st.DataObject) -> None:
    bits = 8 * dtype.itemsize
    edge = INFINITY[dtype]
    near = st.integers(-2, 2).flatmap(lambda d: st.sampled_from([edge + d, edge + d + (1 << (bits - 1))]))
    word = st.one_of(st.integers(0, (1 << bits) - 1), near)
    words = np.array(data.draw(st.lists(word, min_size=1, max_size=4)), WORDS[dtype.itemsize])
    values = torch.from_numpy(words.copy().view(np.uint8)).view(dtype)
    assert all_finite(words, dtype) == bool(values.isfinite().all())


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(np.full(3, 0xFFFF, np.uint16), torch.int16)
    assert all_finite(np.empty(0, np.uint16), torch.bfloat16)
