"""Strategies to hold a KV cache with, run through a real store and a restart, and judged by figures.

    kvstored experiments run all            # or python -m experiments --experiments all

Worker A makes each strategy's state and puts it into a daemon; the daemon restarts; worker B, a new process, restores
the state and continues the text. What a strategy is stands in `Strategy`; `catalogue` lists them in the order of the
report; `run` drives the processes; `report` prints. Only clients and integrations are used, nothing inside the engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvstore.config import CodecPolicy

# Light: without the extra the command still has to come as far as saying so.
if TYPE_CHECKING:
    import torch

    from experiments.lab import Lab

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Step: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""The next tokens (1, n) in, logits (n, vocabulary) out; moves on by n tokens at each call."""
Category: TypeAlias = str
"""One of the keys of `report.COLOURS`."""
Units: TypeAlias = str
"""What a strategy's model reads: "tokens" of the lab's model, or "bytes"."""


class Strategy(Protocol):
    """One row of the report.

    row: its number. source: the paper or library. kept: "faithful", or in words what differs from the source. policy:
    how the daemon may encode the state below hot; None: bit for bit. engine: "" or the folder of wheels that its
    process needs on the path. units: what its model reads.
    """

    @property
    def row(self) -> int:
        """Its number."""
        ...

    @property
    def name(self) -> str:
        """What a user calls it by."""
        ...

    @property
    def category(self) -> Category:
        """What it is like."""
        ...

    @property
    def source(self) -> str:
        """The paper or library."""
        ...

    @property
    def kept(self) -> str:
        """What differs from that."""
        ...

    @property
    def policy(self) -> CodecPolicy | None:
        """How the daemon may encode it."""
        ...

    @property
    def engine(self) -> str:
        """Whose wheels its process needs."""
        ...

    @property
    def units(self) -> Units:
        """What its model reads."""
        ...

    def state(self, lab: "Lab") -> Tensors:
        """In worker A: everything that is needed to continue after `lab.ids`. Nothing else crosses the restart."""
        ...

    def resume(self, lab: "Lab", tensors: Tensors) -> Step:
        """In worker B: the model as it stands after `lab.ids`, from what the store gave back. Changes no tensor."""
        ...

    def notes(self, lab: "Lab") -> str:
        """What it measures of its own, as a sentence under the table; "" for nothing."""
        ...


@dataclass(frozen=True)
class Found:
    """One row's figures, all of one run. None: it has no such figure, or failed (`failed` says why).

    bytes_per_token: held in the store after the restart, metadata counted. encoding: how. restore_over_prefill: time of
    the get and of making it ready, over that of the prefill it saves. ms_per_token_over_baseline: time of one token
    over the baseline's, interleaved in the same process. kl: of the next-token distribution from the exact one, nats,
    mean over the continuation. perplexity_change, top1, retrieval: percent; retrieval are questions answered exactly.
    bit_equal: logits are those of the state that was never stored, bit for bit. worse_than_nothing: more KL than
    without any context. note: a sentence of its own under the table.
    """

    row: int
    name: str
    category: str
    kept: str
    bytes_per_token: float | None = None
    encoding: str | None = None
    restore_over_prefill: float | None = None
    ms_per_token_over_baseline: float | None = None
    kl: float | None = None
    perplexity_change: float | None = None
    top1: float | None = None
    retrieval: float | None = None
    bit_equal: bool | None = None
    worse_than_nothing: bool | None = None
    note: str = ""
    failed: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row's keys and values as `--json` prints them: figures only."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("note", "failed")}


class ExperimentFailed(Exception):
    """The run as a whole cannot go on: a wrong text or model, a daemon that does not start. One sentence."""
