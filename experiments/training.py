"""What is trained against the exact model: a cartridge, and a model that has met the codec.

Both distil: the teacher is the model with all of its prefix, the student has less, and the loss is the KL between them.
Seeded, so a run can be repeated; on one machine with the same threads to the bit.
"""

from typing import Any, ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab
from experiments.smooth import CALIBRATION
from experiments.sparse import importance, rows_of
from kvstore.config import CodecPolicy

NF4_LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
"""arXiv 2305.14314, appendix E."""
BLOCK = 64


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL of the student's logits from the teacher's, both (n, vocabulary)."""
    p, q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def after(model: Any, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, position: int) -> torch.Tensor:
    """Logits (n, vocabulary) of tokens (1, n) after K and V (layers, rows, heads, dim), differentiable."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(k.shape[0]):
        cache.update(k[layer].transpose(0, 1)[None], v[layer].transpose(0, 1)[None], layer)
    positions = torch.arange(position, position + ids.shape[1])[None]
    logits: torch.Tensor = model(ids, past_key_values=cache, position_ids=positions).logits[0]
    return logits


class Cartridge10x(Baseline):
    """A tenth of the rows, trained offline so that the model answers as after the whole prefix; stored for ever.

    It begins as the rows that got the most attention; the first, an attention sink, stays as it is. It learns from
    pieces of the prefix itself, read again after it.
    """

    row = 37
    name = "cartridge-10x"
    category = "roadmap"
    source = "arXiv 2506.06266"
    kept = "trained on the prefix read again, where the paper has conversations made about it; few steps"
    times: ClassVar[int] = 10
    steps: ClassVar[int] = 24
    piece: ClassVar[int] = 96
    rate: ClassVar[float] = 0.02

    def state(self, lab: Lab) -> Tensors:
        """The trained K and V."""
        tokens = int(lab.ids.shape[1])
        rows = importance(lab).topk(max(2, tokens // self.times), dim=1).indices.sort(dim=1).values
        k, v = self._trained(lab, *(rows_of(x, rows).clone() for x in lab.prefix))
        return {"k": k.contiguous(), "v": v.contiguous(), "position": torch.tensor([tokens])}

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model after it, at the position where the prefix ended."""
        return lab.step(tensors["k"], tensors["v"], position=int(tensors["position"][0]))

    def _trained(self, lab: Lab, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, generator = int(lab.ids.shape[1]), torch.Generator().manual_seed(0)
        learned = [x[:, 1:].clone().requires_grad_() for x in (k, v)]
        # A step in proportion to each layer's own size: keys are ten times as large as values.
        groups = [
            {"params": [x], "lr": self.rate * float(y.square().mean().sqrt())}
            for x, y in zip(learned, (k, v), strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        piece = min(self.piece, tokens - 1)
        for step in range(self.steps):
            at = int(torch.randint(0, tokens - piece + 1, (1,), generator=generator))
            ids = lab.ids[:, at : at + piece]
            with torch.inference_mode():
                teacher = after(lab.model, *lab.prefix, ids, tokens)
            k_now, v_now = (torch.cat((x[:, :1], y), dim=1) for x, y in zip((k, v), learned, strict=True))
            loss = divergence(teacher.clone(), after(lab.model, k_now, v_now, ids, tokens))
            grads = torch.autograd.grad(loss, learned)
            for x, grad in zip(learned, grads, strict=True):
                x.grad = grad
            for group in optimizer.param_groups:
                group.setdefault("first", group["lr"])
                group["lr"] = group["first"] * (1 - step / self.steps)
            optimizer.step()
        k, v = (torch.cat((x[:, :1], y.detach()), dim=1) for x, y in zip((k, v), learned, strict=True))
        return k, v


class Cartridge20x(Cartridge10x):
    """A twentieth of the rows."""

    row = 38
    name = "cartridge-20x"
    times = 20


def in_nf4(x: torch.Tensor) -> torch.Tensor:
    """X after NF4 in blocks of 64 along its last dimensions, gradients passed through as if nothing had happened."""
    flat = x.detach().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = torch.tensor(NF4_LEVELS)
    codes = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    coded = (levels[codes] * scale).flatten()[: len(flat)].view_as(x)
    return x + (coded - x.detach())


class TrainedForNF4(Baseline):
    """The model's input norms trained through plain NF4, to compare with `4-bit-plain-nf4`, which trains nothing.

    The norms, one number a channel and layer, travel with the state, exact.
    """

    row = 40
    name = "qat-plain-nf4"
    category = "roadmap"
    source = "ours, after arXiv 2305.17888 (LLM-QAT)"
    kept = "ours: only the input norms are trained, some steps on Python's manual, K and V in NF4 as they are written"
    policy = CodecPolicy("nf4")
    steps: ClassVar[int] = 12
    tokens: ClassVar[int] = 128
    rate: ClassVar[float] = 3e-4

    def __init__(self) -> None:
        self._norms: torch.Tensor | None = None

    def state(self, lab: Lab) -> Tensors:
        """K and V of the trained model, and its norms."""
        if self._norms is None:
            self._norms = self._trained(lab)
        with self._wearing(lab, self._norms):
            k, v = lab.prefill(lab.ids)
        return {"k": k, "v": v, "norms": self._norms.view(torch.int32)}

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The trained model after them: its norms are put on for each call."""
        norms = tensors["norms"].clone().view(torch.float32)
        with self._wearing(lab, norms):
            step = lab.step(tensors["k"], tensors["v"])

        def worn(ids: torch.Tensor) -> torch.Tensor:
            with self._wearing(lab, norms):
                return step(ids)

        return worn

    def _trained(self, lab: Lab) -> torch.Tensor:
        """The input norms (layers, hidden) after training."""
        text = CALIBRATION.read_text()
        norms = _norms(lab).clone().requires_grad_()
        optimizer = torch.optim.Adam([norms], lr=self.rate)
        for step in range(self.steps):
            piece = text[10_000 * (step + 1) :][: self.tokens * 8]
            ids = lab.tokenizer(piece, return_tensors="pt").input_ids[:, : self.tokens]
            with torch.inference_mode():
                teacher = lab.model(ids).logits[0]
            student = torch.func.functional_call(
                lab.model,
                {f"model.layers.{i}.input_layernorm.weight": row for i, row in enumerate(norms)},
                (ids,),
                {"past_key_values": through_nf4()},
            ).logits[0]
            (norms.grad,) = torch.autograd.grad(divergence(teacher.clone(), student), [norms])
            optimizer.step()
        return norms.detach()

    def _wearing(self, lab: Lab, norms: torch.Tensor) -> "_Worn":
        return _Worn(lab, norms)


class _Worn:
    """For a block, the model has other input norms."""

    def __init__(self, lab: Lab, norms: torch.Tensor) -> None:
        self._lab, self._norms, self._own = lab, norms, _norms(lab).clone()

    def __enter__(self) -> None:
        self._put(self._norms)

    def __exit__(self, *_: object) -> None:
        self._put(self._own)

    def _put(self, norms: torch.Tensor) -> None:
        with torch.no_grad():
            for layer, row in zip(self._lab.model.model.layers, norms, strict=True):
                layer.input_layernorm.weight.copy_(row)


def _norms(lab: Lab) -> torch.Tensor:
    return torch.stack([layer.input_layernorm.weight.detach() for layer in lab.model.model.layers])


def through_nf4() -> Any:
    """A transformers cache that holds what NF4 leaves of K and V."""
    from transformers import DynamicCache

    class Coded(DynamicCache):  # type: ignore[misc]  # transformers is not followed, so its classes are Any
        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **more: Any) -> Any:
            return super().update(in_nf4(key_states), in_nf4(value_states), layer_idx, *args, **more)

    return Coded()
