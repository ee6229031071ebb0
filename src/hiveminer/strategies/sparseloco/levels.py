"""Quantization levels of a chunk, fitted to its magnitudes (Lloyd-Max).

A level is a positive normal float32 rounded to four bits of mantissa, and its code the upper
twelve bits of that number without the sign. So codes are in the order of the levels, and a level
is its code shifted, the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHIFT = 19
LOWEST, HIGHEST = 1 << 4, (255 << 4) - 1
"""Codes of the smallest normal float32 and of the largest level; 0 is no level."""
SMALLEST = float(np.float32(2.0**-126))

_START = {
    1: (1.0,),
    2: (0.594, 2.594),
    4: (0.330, 1.178, 2.365, 4.365),
    8: (0.175, 0.573, 1.030, 1.571, 2.231, 3.079, 4.266, 6.266),
}
"""Lloyd-Max levels of an exponential distribution of mean 1: the tail of a heavy-tailed one."""
_SAMPLE = 256
_PASSES = 3


def fit_levels(
    magnitudes: NDArray[np.float32], counts: NDArray[np.int64], levels: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Codes of the levels, uint16[chunks, levels], and each value's level, uint8[values].

    `magnitudes` are those of all chunks in a row, `counts` how many each has (at least one);
    all are normal numbers. Codes of a chunk increase; those after the last one in use are 0.
    Each level is the mean of its values, so quantization never adds energy beyond rounding.
    """
    starts = np.cumsum(counts) - counts
    sums = np.add.reduceat(magnitudes, starts, dtype=np.float64)
    low = np.minimum.reduceat(magnitudes, starts).astype(np.float64)
    centers = low[:, None] + (sums / counts - low)[:, None] * np.array(_START[levels])
    chunk_of = np.repeat(np.arange(len(counts)), counts)
    stride = max(1, len(magnitudes) // (len(counts) * _SAMPLE))
    sample, sample_of = magnitudes[::stride], chunk_of[::stride]
    for _ in range(_PASSES if levels > 1 else 0):
        centers = _means(sample, sample_of, _nearest(sample, sample_of, centers), centers)[0]
    nearest = _nearest(magnitudes, chunk_of, centers)
    centers, used = _means(magnitudes, chunk_of, nearest, centers)
    return _compact(np.where(used, _codes(centers), 0), chunk_of, nearest)


def _nearest(
    magnitudes: NDArray[np.float32], chunk_of: NDArray[np.int64], centers: NDArray[np.float64]
) -> NDArray[np.uint8]:
    borders = _float32((centers[:, 1:] + centers[:, :-1]) / 2)
    nearest = np.zeros(len(magnitudes), np.uint8)
    for border in borders.T:
        nearest += magnitudes > border[chunk_of]
    return nearest


def _means(
    magnitudes: NDArray[np.float32],
    chunk_of: NDArray[np.int64],
    nearest: NDArray[np.uint8],
    centers: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The mean of each level's values (unchanged without any), and which levels have values."""
    cell = chunk_of * centers.shape[1] + nearest
    counts = np.bincount(cell, minlength=centers.size).reshape(centers.shape)
    sums = np.bincount(cell, magnitudes, minlength=centers.size).reshape(centers.shape)
    return np.where(counts, sums / np.maximum(counts, 1), centers), counts > 0


def _codes(values: NDArray[np.float64]) -> NDArray[np.int64]:
    whole = _float32(values).view(np.uint32).astype(np.int64)
    rounded: NDArray[np.int64] = (whole + (1 << (SHIFT - 1))) >> SHIFT
    return rounded.clip(LOWEST, HIGHEST)


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.minimum(values, np.finfo(np.float32).max).astype(np.float32)


def _compact(
    codes: NDArray[np.int64], chunk_of: NDArray[np.int64], nearest: NDArray[np.uint8]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Remove unused levels, and merge those that round to the same code."""
    codes = np.maximum.accumulate(codes, axis=1)
    new = np.diff(codes, prepend=0, axis=1) > 0
    if new.all():
        return codes.astype(np.uint16), nearest
    place = np.cumsum(new, axis=1) - 1
    compact = np.zeros(codes.shape, np.uint16)
    rows, columns = np.nonzero(new)
    compact[rows, place[rows, columns]] = codes[rows, columns]
    return compact, place[chunk_of, nearest].astype(np.uint8)
