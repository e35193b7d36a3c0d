"""The work of one launch that decodes nf4-kv2 into paged blocks, described: `cuda_paged` does it.

    Paged   where tensors of one shape go: layers of blocks, alike but for where they begin
    Work    all jobs of a launch: a tensor each, and the small tables that they need, as bytes to bring to the device

A job is a row of integers (`Field`), most of them addresses on the device. Lengths are those of the codec's own checks
(`codecs.nf4_kv2`), made before; no value in a part leads out of it. Pure; any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from kvstore.kernels.cpu import Turns
from kvstore.kernels.reference_kv import GROUP
from kvstore.kernels.reference_turn import EIGHT, angles


class Field(IntEnum):
    """Of a job. Known to the kernel by number."""

    CODES = 0
    SCALES = 1
    TOPS = 2
    MEAN_CODES = 3
    MEAN_EXPONENTS = 4
    TURNING = 5
    ANGLES = 6  # float32 (layers, 2, pairs): sines, then chords
    KEPT = 7
    KEPT_ROWS = 8  # int16 (tokens,): which kept row a token is, -1: none
    PLACES = 9  # int32, of each block of the chunk; -1: it is not wanted
    LAYERS = 10  # int64 (layers,): where each begins
    CODED = 11
    LEAD = 12
    GROUPS = 13
    BLOCK_SHIFT = 14
    PAIRS = 15
    BRAIN = 16  # kept rows are bfloat16, not float16
    INTERLEAVED = 17
    KEPT_COUNT = 18


class Where(NamedTuple):
    """Buffers alike but for where they begin. strides: in values, of a block, a token, a head; channels are dense."""

    dtype: torch.dtype
    layers: int
    block_tokens: int
    inner: int
    d: int
    strides: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor, of parts that were checked. kept: the tokens kept in 16 bits; lead: how many of them come first.

    mean_nbytes: of means' codes and exponents, which turning bits follow.
    """

    coded: int
    lead: int
    groups: int
    block: int
    blocks: int
    kept: tuple[int, ...]
    tokens: int
    mean_nbytes: tuple[int, int]
    brain: bool
    turns: Turns | None

    def tables(self, places: Sequence[int], layers: Sequence[int]) -> dict[Field, np.ndarray]:
        """What it needs beside its parts."""
        rows = np.full(self.tokens, -1, np.int16)
        rows[list(self.kept)] = range(len(self.kept))
        found: dict[Field, np.ndarray] = {
            Field.KEPT_ROWS: rows,
            Field.PLACES: np.array(places, np.int32),
            Field.LAYERS: np.array(layers, np.int64),
        }
        if self.turns is not None:
            found[Field.ANGLES] = torch.stack(angles(self.turns.tangents), dim=1).numpy()
        return found

    def row(self, parts: Mapping[str, int], tables: Mapping[Field, int]) -> np.ndarray:
        """Its integers. parts, tables: where each lies on the device."""
        row = np.zeros(len(Field), np.int64)
        row[Field.CODES] = parts[""]
        row[Field.SCALES] = parts["scale"]
        row[Field.TOPS] = parts["scale"] + self.blocks
        mean = parts.get("mean", 0)
        codes, exponents = self.mean_nbytes
        row[Field.MEAN_CODES : Field.TURNING + 1] = mean, mean + codes, mean + codes + exponents
        row[Field.KEPT] = parts.get("kept", 0)
        for field, address in tables.items():
            row[field] = address
        pairs = 0 if self.turns is None else self.turns.tangents.shape[1]
        row[Field.CODED : Field.PAIRS + 1] = self.coded, self.lead, self.groups, self.block.bit_length() - 1, pairs
        row[Field.BRAIN] = self.brain
        row[Field.INTERLEAVED] = self.turns is not None and bool(self.turns.rotary.interleaved)
        row[Field.KEPT_COUNT] = len(self.kept)
        return row

    @property
    def programs(self) -> int:
        """A layer of it takes so many programs."""
        return max(1, self.groups or -(-self.coded // GROUP))


@dataclass(frozen=True, slots=True)
class Work:
    """One launch. jobs: int64 (count, fields) on the device."""

    where: Where
    jobs: torch.Tensor
    count: int
    most_groups: int


def mean_nbytes(layers: int, groups: int, inner: int, d: int) -> tuple[int, int]:
    """Of the codes and the exponents of means."""
    return layers * groups * inner * d, layers * groups * inner * -(-d // EIGHT)
