"""From keys, values and their gradients to a basis: statistics, transform, step, classes and tables.

For each group of layers the coefficients are y = E^T W (x - mean): W is the root of the Fisher information, so that an
error of one counts alike everywhere, and E the eigenvectors of the covariance in that metric. One step for all
coefficients of K and V of all layers is then the best choice there is (reverse water-filling): bits go where they
matter, by layer, head and channel at once. The step is the one thing chosen, by bits or by KL.
Knows no model and no file. Not thread-safe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvstore.codecs.basis import LEVELS, About, Basis, made
from kvstore.codecs.classes import CLASSES, DELTA, chosen, expected, histograms_of, lengths, tables_of
from kvstore.codecs.kv_learned import coefficients
from kvstore.codecs.parts import KEPT_KEYS
from kvstore.codecs.rans import ESCAPE, Tables
from kvstore.codecs.rotation import Rotation
from kvstore.errors import ConfigError

FLOOR = 0.5
"""Of the mean information of a layer's channels, added to each: what few texts say of it is not believed to the end."""
SKIPPED = KEPT_KEYS
"""The first tokens of a piece, which stay in 16 bits anyway."""
CHUNK = 256
HELD_OUT = 4
"""One piece in so many is not learned from: step and tables are chosen on it."""
_SHRINK = 0.01
_TRIALS = 40
_NEAR, _SOUGHT = 1.02, 4
"""How near the step has to be, and the chunks it is sought with."""
_RIPE = 3
"""Rounds of choosing classes by tables and tables by classes."""
ROLES = (("key", "k"), ("value", "v"))


@dataclass(frozen=True, slots=True)
class Piece:
    """K, V and the gradients of log p with respect to them, (layers, tokens, heads, dim) at positions from 0 on.

    judged: tokens that followed.
    """

    k: torch.Tensor
    v: torch.Tensor
    gk: torch.Tensor
    gv: torch.Tensor
    judged: int


class Statistics:
    """Sums over pieces: of K before RoPE and of V by group of layers, and of their gradients by layer."""

    def __init__(self, shape: tuple[int, int, int], group: int, rotation: Rotation) -> None:
        """shape: layers, heads, dim."""
        layers, heads, dim = shape
        self.shape, self.group, self.rotation = shape, group, rotation
        self.row = heads * dim
        self.sizes = [min(group, layers - start) * self.row for start in range(0, layers, group)]
        self.tokens = 0
        self.pieces = 0
        self.sums = {role: torch.zeros(layers * self.row, dtype=torch.float64) for role, _ in ROLES}
        self.squares = {role: [torch.zeros(n, n, dtype=torch.float64) for n in self.sizes] for role, _ in ROLES}
        self.fisher = {role: torch.zeros(layers, self.row, self.row, dtype=torch.float64) for role, _ in ROLES}
        self._first: tuple[torch.Tensor, torch.Tensor] | None = None
        self._held_out: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gradients = 0

    def add(self, piece: Piece) -> None:
        """Count a piece; every fourth is kept for choosing, and teaches only its gradients."""
        held_out = self.pieces % HELD_OUT == HELD_OUT - 1
        self.pieces += 1
        for role, x, gradient in (("key", piece.k, piece.gk), ("value", piece.v, piece.gv)):
            turn = role == "key"
            g = self._rows(gradient, turn=turn).double().view(self.shape[0], self.row, -1)
            self.fisher[role] += g @ g.mT / piece.judged
            if not held_out:
                rows = self._rows(x, turn=turn).double()
                self.sums[role] += rows.sum(dim=1)
                for into, part in zip(self.squares[role], torch.split(rows, self.sizes), strict=True):
                    into.addmm_(part, part.T)
        self._gradients += piece.k.shape[1] - SKIPPED
        self._first = self._first or (piece.k, piece.v)
        if held_out:
            self._held_out.append((piece.k, piece.v))
        else:
            self.tokens += piece.k.shape[1] - SKIPPED

    def _rows(self, x: torch.Tensor, *, turn: bool) -> torch.Tensor:
        """Without the first tokens and RoPE: float32 (layers*heads*dim, tokens)."""
        x = self.rotation.turned(x, 0, back=True) if turn else x
        return x[:, SKIPPED:].permute(0, 2, 3, 1).reshape(-1, x.shape[1] - SKIPPED)

    def information(self, role: str) -> torch.Tensor:
        """A token of the prefix and one that follows: float64 (layers, heads*dim, heads*dim)."""
        return self.fisher[role] / self._gradients

    def samples(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of the pieces kept for choosing; of the first piece if there is none."""
        return self._held_out or ([self._first] if self._first else [])


@dataclass(frozen=True, slots=True)
class Found:
    """What a step gives: the tensors of a basis, bits a value, and the predicted KL a token behind 1,024 tokens."""

    step: float
    tensors: dict[str, torch.Tensor]
    bits: float
    kl: float


class Learning:
    """A transform, and what each step of it would give."""

    def __init__(self, statistics: Statistics, model: str, prefix: int = 1024) -> None:
        """prefix: tokens whose errors add up in the predicted KL."""
        if not statistics.tokens:
            raise ConfigError("nothing to learn from: no piece of text was long enough")
        self._s, self._model, self.prefix = statistics, model, prefix
        self._unit = {role: self._transforms(role) for role, _ in ROLES}
        self._harm = {role: self._harms(role) for role, _ in ROLES}
        one = self._basis(self._tensors(1.0, {}), 0.0, 0.0, 0.0)
        self._coefficients = {
            role: [
                coefficients(one, role, (k if role == "key" else v)[:, start : start + CHUNK], start)
                for k, v in statistics.samples()
                for start in range(SKIPPED, k.shape[1], CHUNK)
            ]
            for role, _ in ROLES
        }

    def at(self, step: float, chunks: int | None = None) -> Found:
        """What a step gives. chunks: by so many of them alone, which is sooner done."""
        some = {role: of[:: max(1, len(of) // chunks)] if chunks else of for role, of in self._coefficients.items()}
        fitted: dict[str, _Fitted] = {role: _fitted([y / step for y in some[role]]) for role, _ in ROLES}
        values = sum(y.numel() for of in some.values() for y in of)
        bits = sum(f.bits for f in fitted.values()) / values
        harm = sum(float((self._harm[role] * fitted[role].missed.double()).sum()) for role, _ in ROLES) * step**2
        return Found(step, self._tensors(step, fitted), bits, harm * self.prefix / 2)

    def for_bits(self, bits: float) -> Found:
        """The least step that needs no more bits a value."""
        return self.at(self._search(lambda found: found.bits > bits)[1])

    def for_kl(self, kl: float) -> Found:
        """The largest step whose predicted KL is not above."""
        return self.at(self._search(lambda found: found.kl <= kl)[0])

    def coarser(self, found: Found, times: int) -> Found:
        """A step so many times as wide, in which the finer one's cells nest (`Basis.times`): the same matrices."""
        coarse = self.at(found.step * times)
        scales = {name: x * times for name, x in found.tensors.items() if name.endswith(".scale")}
        matrices = {name: found.tensors[name] for name in (scale.removesuffix(".scale") for scale in scales)}
        return replace(coarse, tensors={**coarse.tensors, **matrices, **scales})

    def basis(self, found: Found, kl_measured: float = 0.0) -> Basis:
        """The artifact."""
        return self._basis(found.tensors, found.bits, found.kl, kl_measured)

    def _search(self, fine: Callable[[Found], bool]) -> tuple[float, float]:
        """The largest step that is still fine and the least that is not, within 1%. Raises ConfigError."""
        low, high = 0.0, float("inf")
        step = float(np.sqrt(np.mean([float(y.square().mean()) for of in self._coefficients.values() for y in of])))
        for _ in range(_TRIALS):
            low, high = (step, high) if fine(self.at(step, _SOUGHT)) else (low, step)
            if low and high / low < _NEAR:
                return low, high
            step = step * 2 if high == float("inf") else step / 2 if not low else (low * high) ** 0.5
        raise ConfigError("no step gives that: ask for 0.5 to 8 bits")

    def _information(self, role: str, group: int) -> torch.Tensor:
        first = group * self._s.group
        return self._s.information(role)[first : first + self._s.group]

    def _harms(self, role: str) -> torch.Tensor:
        """What a squared error of one in each coefficient costs: float64 (layers*heads*dim,)."""
        row, found = self._s.row, []
        for at, unit in enumerate(self._unit[role]):
            by_layer = unit.view(-1, row, unit.shape[1])
            found.append((by_layer * (self._information(role, at) @ by_layer)).sum(dim=(0, 1)))
        return torch.cat(found)

    def _transforms(self, role: str) -> list[torch.Tensor]:
        """Values of coefficients, float64 (n, n) for each group."""
        s, found = self._s, []
        mean = s.sums[role] / s.tokens
        for at, (squares, part) in enumerate(zip(s.squares[role], torch.split(mean, s.sizes), strict=True)):
            roots, inverses = _roots(self._information(role, at))
            covariance = squares / s.tokens - part[:, None] * part[None]
            seen = roots @ covariance @ roots
            seen = (seen + seen.T) / 2 + _SHRINK * seen.diagonal().mean().clamp(min=1e-12) * torch.eye(len(seen))
            _, vectors = torch.linalg.eigh(seen)
            found.append(inverses @ vectors.flip(1))
        return found

    def _tensors(self, step: float, fitted: "dict[str, _Fitted]") -> dict[str, torch.Tensor]:
        s = self._s
        tensors = {"angles": s.rotation.angles.clone()}
        for role, name in ROLES:
            mean = s.sums[role] / s.tokens
            squares = torch.cat([squares.diagonal() for squares in s.squares[role]]) / s.tokens
            tensors[f"{name}.mean"] = mean.float()
            tensors[f"{name}.spread"] = (squares - mean.square()).clamp(min=1e-9).float()
            for at, unit in enumerate(self._unit[role]):
                scale = (unit * step).abs().amax(dim=1).float()
                tensors[f"{name}.{at}"] = (unit * step / scale[:, None].double()).half()
                tensors[f"{name}.{at}.scale"] = scale
            fit = fitted.get(role) or _Fitted.nothing(mean.numel())
            tensors[f"{name}.classes"] = fit.classes
            tensors[f"{name}.tables"] = torch.from_numpy(fit.tables.counts)
            tensors[f"{name}.levels"] = fit.levels
        return tensors

    def _basis(self, tensors: dict[str, torch.Tensor], bits: float, kl: float, kl_measured: float) -> Basis:
        s = self._s
        layers, heads, dim = s.shape
        about = About(
            self._model, layers, heads, dim, s.group, s.rotation.interleaved, s.tokens, round(bits, 4), kl, kl_measured
        )
        return made(about, tensors)


@dataclass(frozen=True, slots=True)
class _Fitted:
    """Tables and classes for coefficients in steps, the bits that these cost, and their mean squared error."""

    tables: Tables
    classes: torch.Tensor
    levels: torch.Tensor
    bits: float
    missed: torch.Tensor

    @classmethod
    def nothing(cls, count: int) -> "_Fitted":
        """Before anything was seen."""
        tables = tables_of(np.zeros((CLASSES, 256)), np.zeros(256))
        levels, missed = torch.zeros(CLASSES, LEVELS), torch.zeros(count)
        return cls(tables, torch.zeros(count, dtype=torch.uint8), levels, 0.0, missed)


def _fitted(chunks: Sequence[torch.Tensor]) -> _Fitted:
    """The tables, classes and levels that code these coefficients best. chunks: float32 (coefficients, tokens)."""
    symbols = [torch.where(q.abs() < -ESCAPE, q, ESCAPE).to(torch.int8) for q in (y.round() for y in chunks)]
    seen = [histograms_of(some) for some in symbols]
    tables = tables_of(np.stack([expected(of) * 4096 for of in range(CLASSES)]), np.zeros(256))
    learned = (sum(seen, torch.zeros_like(seen[0])) @ lengths(tables).T).argmin(dim=1).to(torch.uint8)
    for _ in range(_RIPE):
        picked = [chosen(some, tables, learned) for some in seen]
        sums, away = np.zeros((CLASSES, 256)), np.zeros(256)
        for some, of in zip(seen, picked, strict=True):
            sums += torch.zeros(CLASSES, 256).index_add_(0, of.long(), some).double().numpy()
            away += np.bincount(of.long().numpy() - learned.long().numpy() - ESCAPE, minlength=256)
        tables = tables_of(sums, away)
        learned = (sum(seen, torch.zeros_like(seen[0])) @ lengths(tables).T).argmin(dim=1).to(torch.uint8)
    picked = [chosen(some, tables, learned) for some in seen]
    bits = 0.0
    for some, of in zip(seen, picked, strict=True):
        costs = some @ lengths(tables).T
        bits += float(costs.gather(1, of.long()[:, None]).sum())
        bits += float(torch.from_numpy(tables.lengths[DELTA])[of.long() - learned.long() - ESCAPE].sum())
    levels = _levels(chunks, picked)
    missed = _missed(chunks, picked, levels)
    return _Fitted(tables, learned, levels, bits, missed)


def _levels(chunks: Sequence[torch.Tensor], classes: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the mean of what is rounded to 1, 2 and 3 lies from it in each class: float32 (40, 3)."""
    sums, counts = torch.zeros(CLASSES, LEVELS), torch.zeros(CLASSES, LEVELS)
    for y, of in zip(chunks, classes, strict=True):
        size, q = y.abs(), y.abs().round()
        rows = of.long()
        for at in range(LEVELS):
            hit = q == at + 1
            sums[:, at].index_add_(0, rows, torch.where(hit, size - q, 0.0).sum(dim=1))
            counts[:, at].index_add_(0, rows, hit.sum(dim=1).float())
    return (sums / (counts + 16)).clamp(-0.45, 0.45)


def _missed(chunks: Sequence[torch.Tensor], classes: Sequence[torch.Tensor], levels: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each coefficient, in steps."""
    total, tokens = torch.zeros(chunks[0].shape[0]), 0
    for y, of in zip(chunks, classes, strict=True):
        size = y.abs().round()
        more = torch.cat((torch.zeros(CLASSES, 1), levels, torch.zeros(CLASSES, 1)), dim=1)[
            of.long()[:, None], size.clamp(max=LEVELS + 1).long()
        ]
        total += (y.abs() - size - more).square().sum(dim=1)
        tokens += y.shape[1]
    return total / tokens


def _roots(information: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The root of the information of some layers together and its inverse: block diagonal, float64 (n, n)."""
    values, vectors = torch.linalg.eigh(information)
    values = values.clamp(min=0)
    values = values + (FLOOR * values.mean(dim=1, keepdim=True)).clamp(min=1e-18)
    roots, inverses = ((vectors * values[:, None] ** power) @ vectors.mT for power in (0.5, -0.5))
    whole = [torch.block_diag(*of) for of in (roots, inverses)]  # type: ignore[no-untyped-call]
    return whole[0], whole[1]
