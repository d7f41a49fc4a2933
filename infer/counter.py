"""Random numbers that depend on nothing but a seed and a place: the same request draws the same in any batch.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) read at any place:
its n-th number is a hash of `seed + n * golden`, so no state is kept and a preempted request needs none back.

B requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Which draw of one token: drawing it, drawing a draft of it, and accepting that draft must not share a number.
SAMPLE, DRAFT, ACCEPT = 0, 1, 2
_DRAWS = 4


def _signed(bits: int) -> int:
    """The int64 with these 64 bits; products and sums of int64 wrap as those of uint64 do."""
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(z_B: Tensor) -> Tensor:
    # >> copies the sign of an int64; the masks make it the shift of an unsigned one.
    z_B = (z_B ^ (z_B >> 30 & 0x3FFFFFFFF)) * _FIRST
    z_B = (z_B ^ (z_B >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return z_B ^ (z_B >> 31 & 0x1FFFFFFFF)


def splitmix(seeds_B: Tensor, places_B: Tensor) -> Tensor:
    """Number `place` (from 0) of the SplitMix64 that begins at each seed: 64 bits as int64."""
    return _mix(seeds_B + (places_B + 1) * _GOLDEN)


def uniform(seeds_B: Tensor, positions_B: Tensor, draw: int = SAMPLE) -> Tensor:
    """One number in [0, 1) for each request, multiples of 2^-53, float64.

    Args:
        seeds_B: int64, any.
        positions_B: int64, how many tokens the request has generated before this one.
        draw: SAMPLE, DRAFT or ACCEPT.
    """
    # The seed is hashed first: seeds that lie close together, as people's do, would else begin one sequence at
    # places close together.
    bits_B = splitmix(splitmix(seeds_B, torch.zeros_like(seeds_B)), positions_B * _DRAWS + draw)
    return (bits_B >> 11 & (1 << 53) - 1).double() * 2.0**-53


def seed_of_choice(seed: int, index: int) -> int:
    """The seed of choice `index` of a request that asks for several; the first one's is the request's own."""
    if not index:
        return seed
    return int(splitmix(torch.tensor([_signed(seed & (1 << 64) - 1)]), torch.tensor([index]))[0])
