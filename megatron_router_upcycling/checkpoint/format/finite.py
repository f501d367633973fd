"""Look for NaN and infinity at the speed of memory, in bits rather than numbers."""

import numpy as np
import torch

# Bits of positive infinity. What has larger ones, the sign aside, is a NaN.
INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by a dtype's size


def all_finite(words: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        words: the values' bits as unsigned integers of the dtype's size.
        dtype: other than the dtypes above, whose every value counts as finite.
    """
    if dtype not in INFINITY or not words.size:
        return True
    # As unsigned integers the largest is a negative number, if there is one; as signed, a positive one.
    bits = 8 * words.itemsize
    negative = int(words.max())
    positive = int(words.view(f"i{words.itemsize}").max())
    return positive < INFINITY[dtype] and negative < INFINITY[dtype] + (1 << (bits - 1))
