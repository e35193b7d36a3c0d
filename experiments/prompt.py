"""A shorter prompt: Selective Context keeps the tokens that say most. Cartridges are in `cartridge`."""

from typing import ClassVar

import torch

from experiments import Step, Tensors
from experiments.attention import Baseline
from experiments.lab import Lab, keys_and_values


class Selective2x(Baseline):
    """The half of the tokens with the most self-information under the model itself, prefilled as a prompt."""

    row = 23
    name = "architecture-alteration"
    category = "prompt"
    source = "arXiv 2310.06201 (Selective Context)"
    kept = "by tokens; the paper joins them to phrases"
    times: ClassVar[int] = 2

    def state(self, lab: Lab) -> Tensors:
        """K and V of the shorter prompt."""
        with torch.inference_mode():
            predicted = torch.log_softmax(lab.model(lab.ids).logits[0, :-1], dim=-1)
        said = -predicted.gather(1, lab.ids[0, 1:, None])[:, 0]
        # The first token is an attention sink: no model works without one.
        information = torch.cat((said.new_tensor([float("inf")]), said))
        kept = information.topk(max(1, lab.ids.shape[1] // self.times)).indices.sort().values
        return keys_and_values(*lab.prefill(lab.ids[:, kept]))

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model after the shorter prompt."""
        return lab.step(tensors["k"], tensors["v"])


class Selective10x(Selective2x):
    """A tenth of the tokens."""

    row = 24
    name = "architecture-alteration-10x"
    times = 10


class Selective20x(Selective2x):
    """A twentieth."""

    row = 25
    name = "architecture-alteration-20x"
    times = 20
