"""Philox4x32-10, a counter-based random number generator (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011, doi:10.1145/2063384.2063405).

A number is a pure function of (counter, key), so a token's randomness depends on its request's seed
and its position alone: not on the batch, the rank, or what was drawn before. Both are known to the
host, which is through with a batch before it could have launched the rounds on a device.
Shapes: S sequences; words are 32 bits held in uint64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEP = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)  # golden ratio, sqrt(3) - 1
_WORD_BITS = np.uint64(32)
_WORD = np.uint64(0xFFFFFFFF)
_ROUNDS = 10

# Sets the numbers that pick tokens apart from any that another use of the seed may draw one day.
_TOKEN_STREAM = 0


def philox(counter_S4: Words, key_S2: Words) -> Words:
    """Four random words [S, 4] for each counter and key."""
    even_S2, odd_S2 = counter_S4[:, 0::2], counter_S4[:, 1::2]
    for _ in range(_ROUNDS):
        product_S2 = even_S2 * _MULTIPLIERS
        high_S2, low_S2 = product_S2 >> _WORD_BITS, product_S2 & _WORD
        even_S2, odd_S2 = high_S2[:, ::-1] ^ odd_S2 ^ key_S2, low_S2[:, ::-1]
        key_S2 = (key_S2 + _KEY_STEP) & _WORD
    return np.stack((even_S2, odd_S2), axis=-1).reshape(counter_S4.shape)


def uniform(seeds_S: Words, positions_S: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each (64-bit seed, position of the token)."""
    counter_S4 = np.zeros((len(seeds_S), 4), np.uint64)
    counter_S4[:, 0] = positions_S
    counter_S4[:, 2] = _TOKEN_STREAM
    key_S2 = np.stack((seeds_S & _WORD, seeds_S >> _WORD_BITS), axis=-1)
    words_S4 = philox(counter_S4, key_S2)
    bits_S = ((words_S4[:, 0] >> np.uint64(5)) << np.uint64(26)) | (words_S4[:, 1] >> np.uint64(6))
    return bits_S * 2.0**-53
