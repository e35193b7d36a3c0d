"""The constant tables of NF4 and of its double-quantized scales. Frozen: records rely on every bit.

Constants are given as bits, not computed at import, because `linspace` and decimal parsing have
differed by one unit in the last place between library versions. Nothing here may be changed in place;
`table` returns one shared tensor a device. Any thread.
Source: Dettmers et al. 2023 (NF4, appendix E) and Dettmers et al. 2022 (dynamic 8-bit map).
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

TableName = Literal["code", "pair", "thresholds", "scale_map", "scale_lut"]

_CODE_BITS = (
    "bf800000bf3239b1bf066b30beca32a0be91a24dbe3d353fbdba787100000000"
    "3da2faff3e24cae33e7c04dd3ead033a3ee1a4b83f1007ab3f3913b33f800000"
)
"""The 16 NF4 levels, float32, most significant byte first."""

_THRESHOLD_BITS = (
    "bf591cd8bf1c5270beeb8480beadea76be703cecbe0d38bcbd3a7871"
    "3d22faff3df648623e5067e03e9582d43ec753f93f006d043f248daf3f5c89da"
)
"""Midpoints of neighbouring levels, float32. A value equal to a threshold takes the lower code."""

_POSITIVE_SCALE_BITS = (
    "3513a3b7365a1a94370205ff37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2833a016f013a1eecc13a3c6a80"
    "3a59e83e3a7765ff3aa7ef9d3af1a9fc3b1db22d3b428f5c3b676c8a3b8624dd3b9893743bab020d3bbd70a43bcfdf3b3be24dd3"
    "3bf4bc6a3c0395813c0ccccd3c1604183c1f3b643c3ae1483c68f5c33c8b851f3ca28f5d3cb9999a3cd0a3d73ce7ae153cfeb852"
    "3d0ae1483d1666673d21eb853d2d70a33d38f5c33d447ae13d5000003d5b851f3d670a3d3d728f5d3d7e147b3d84cccd3d8a8f5d"
    "3d9051eb3d96147b3d9bd70a3da1999a3da75c2a3dad1eb83db2e1483db8a3d73dbe66673dc428f73dc9eb853ddb33343df80000"
    "3e0a66663e18cccd3e2733333e35999a3e4400003e5266663e60cccd3e6f33333e7d99993e8600003e8d33343e9466663e9b999a"
    "3ea2cccc3eaa00003eb133333eb866663ebf999a3ec6cccc3ece00003ed533333edc66663ee3999a3eeacccc3ef200003ef93332"
    "3f0033333f03cccc3f0766663f0b00003f0e999a3f1233343f15cccd3f1966663f1d00003f20999a3f2433343f27cccd3f2b6666"
    "3f2f00003f32999a3f3633343f39cccd3f3d66663f4100003f44999a3f4833333f4bcccd3f4f66663f5300003f56999a3f5a3333"
    "3f5dcccd3f6166663f6500003f68999a3f6c33333f6fcccd3f7366663f7700003f7a999a3f7e3333"
)
"""Positive levels of the signed dynamic 8-bit map below 1; the map is -these, 0, these, 1."""

SCALE_LUT_SIZE = 65536


def _floats(bits: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(bits), dtype=">f4").astype(np.float32))


def _scale_map() -> torch.Tensor:
    positive = _floats(_POSITIVE_SCALE_BITS)
    return torch.cat((-positive.flip(0), torch.zeros(1, device="cpu"), positive, torch.ones(1, device="cpu")))


def _scale_lut() -> torch.Tensor:
    """uint8 (65536,): the nearest dynamic-map code of -1 + 2k/65535, as bitsandbytes' CPU path rounds."""
    levels = _scale_map()
    midpoints = 0.5 * (levels[:-1] + levels[1:])
    values = (2.0 * torch.arange(SCALE_LUT_SIZE, dtype=torch.float32, device="cpu")) / (SCALE_LUT_SIZE - 1) + -1.0
    return torch.bucketize(values, midpoints).to(torch.uint8)


def _pair() -> torch.Tensor:
    """float32 (256, 2): the two levels that one byte of packed codes stands for."""
    code = _floats(_CODE_BITS)
    byte = torch.arange(256, device="cpu")
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1).contiguous()


@lru_cache(maxsize=64)
def table(name: TableName, device: torch.device) -> torch.Tensor:
    """A constant table on a device; shared, never to be written.

    code float32 (16,), pair float32 (256, 2), thresholds float32 (15,), scale_map float32 (256,),
    scale_lut uint8 (65536,).
    """
    makers = {
        "code": lambda: _floats(_CODE_BITS),
        "pair": _pair,
        "thresholds": lambda: _floats(_THRESHOLD_BITS),
        "scale_map": _scale_map,
        "scale_lut": _scale_lut,
    }
    return makers[name]().to(device)
