"""The kernel for a tensor: compiled C++ on the CPU, Triton on CUDA, else the torch reference.

Every kernel writes the reference's bytes (`kernels.reference`, `kernels.reference_kv`), so the choice affects only
speed, and a codec works without any kernel.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch

from kvstore.kernels.cpu import ISAS, Along, CpuKernel, Phases, Rotary, Rows, Turns, kernels
from kvstore.kernels.trial import agree

log = logging.getLogger(__name__)


def best(found: Sequence[CpuKernel]) -> CpuKernel | None:
    """The last kernel, the best one the machine has, that writes the first one's bytes here; None if none is found."""
    for kernel in reversed(found):
        if kernel is found[0] or agree(kernel, found[0]):
            return kernel
        log.warning("codec kernel not used instructions=%s reason=wrong bytes in its trial", ISAS[kernel.isa])
    return None


@cache
def _best() -> CpuKernel | None:
    """Tried at a store's start or when the first tensor comes, not at import: most clients need none."""
    return best(kernels())


class KvKernel(Protocol):
    """nf4-kv on one device."""

    def kv_means(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`reference_kv.group_means` of rows of x, the decoded means of each group, and with a rotary `kv_content`."""

    def kv_expand(self, rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Decoded means of each group. codes: int8 (outer, groups, inner, d). Returns float32, that shape."""

    def kv_content(self, x: torch.Tensor, rows: Rows, *rotaries: Rotary) -> torch.Tensor:
        """`reference_content.energies` of rows of x for each pairing. Returns float64 (pairings, outer, inner, 2)."""

    def kv_missed(self, rows: Rows, error: torch.Tensor) -> torch.Tensor:
        """`reference_content.missed`."""

    def kv_along(self, x: torch.Tensor, rows: Rows, how: Along) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_along`."""

    def kv_distance(self, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Squared distance of two tensors of one type, head by head. Returns float64 (outer, inner)."""

    def kv_phases(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary, how: Phases
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_phases`."""

    def kv_sums(
        self, x: torch.Tensor, rows: Rows, rotary: Rotary, tangents: torch.Tensor | None, *, content: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`reference_turn.kv_sums`."""

    def kv_code_means(
        self, rows: Rows, turns: Turns | None, still: torch.Tensor, turned: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`reference_turn.kv_code_means`."""

    def kv_expand_eights(self, rows: Rows, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """`reference_turn.kv_expand_eights`."""

    def kv_encode(
        self, x: torch.Tensor, rows: Rows, means: torch.Tensor | None, turns: Turns | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Codes, scales, tops and errors as `reference_kv.encode_rotated` gives; None or CodecError where not
        finite.
        """

    def kv_decode(
        self,
        coded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        means: torch.Tensor | None,
        rows: Rows,
        out: torch.Tensor,
        turns: Turns | None = None,
    ) -> None:
        """Rows of out from codes, scales and tops, whose lengths the caller has checked."""


def cpu_kernel(x: torch.Tensor) -> CpuKernel | None:
    """The compiled kernel, if it is installed, x is on the CPU, and the kernel passed its trial."""
    return _best() if x.device.type == "cpu" else None


def host_kernel() -> CpuKernel | None:
    """The compiled kernel, for callers that have no tensor at hand."""
    return _best()


def make_ready() -> None:
    """Try the kernel now: a log says at the start if it is not used, and no put takes the time."""
    _best()


def cuda_kernel(x: torch.Tensor) -> ModuleType | None:
    """`kernels.cuda`, if the tensor is on CUDA and Triton is installed."""
    return _imported("kvstore.kernels.cuda") if x.device.type == "cuda" else None


@cache
def kv_kernel(device: torch.device) -> KvKernel | None:
    """The nf4-kv kernel for a device: the compiled one, or `kernels.cuda_kv`; None: use the reference."""
    if device.type == "cuda":
        found: KvKernel | None = _imported("kvstore.kernels.cuda_kv")
        return found
    return _best() if device.type == "cpu" else None


Products = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`reference_learned.learned_products`."""


def products_on(x: torch.Tensor) -> Products | None:
    """kv-learned's products on x's device, if that is CUDA and Triton is installed."""
    found = _imported("kvstore.kernels.cuda_learned") if x.device.type == "cuda" else None
    return None if found is None else found.learned_products


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None
