"""K and V as the model made them: the controls, the store's own codecs, grouped heads, the adapter for transformers."""

import copy
import math
from functools import lru_cache
from typing import Any, ClassVar

import torch

from experiments import Category, Step, Tensors, Units
from experiments.carried import Carried
from experiments.lab import Lab, keys_and_values, stepper
from kvstore.config import CodecPolicy, LayerCodec

FAITHFUL = "faithful"


class Baseline:
    """All K and V, bit for bit. What the others are compared with; a parent for those that change little."""

    row: ClassVar[int] = 1
    name: ClassVar[str] = "baseline"
    category: ClassVar[Category] = "control"
    source: ClassVar[str] = "the model itself"
    kept: ClassVar[str] = FAITHFUL
    policy: ClassVar[CodecPolicy | None] = None
    engine: ClassVar[str] = ""
    units: ClassVar[Units] = "tokens"

    def state(self, lab: Lab) -> Tensors:
        """K and V of every layer."""
        return keys_and_values(*lab.prefix)

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model after them."""
        return lab.step(tensors["k"], tensors["v"])

    def notes(self, lab: Lab) -> str:
        """Nothing."""
        del lab
        return ""


class NoContext(Baseline):
    """Nothing is kept: the continuation starts from an empty cache. What is worse than this is of no use."""

    row = 0
    name = "no-context"
    source = "control"
    kept = "nothing is kept"

    def state(self, lab: Lab) -> Tensors:
        """Nothing."""
        del lab
        return {}

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The model at position 0."""
        from transformers import DynamicCache

        del tensors
        return stepper(lab.model, DynamicCache(), 0)


class Transformers(Baseline):
    """The integration for transformers: `PrefixCache.commit` in worker A, `PrefixCache.restore` in worker B."""

    row = 5
    name = "transformers"
    category = "engine"
    source = "kvstored_client.integrations.transformers"

    def state(self, lab: Lab) -> Tensors:
        """What PrefixCache puts: chunks of up to 64 tokens under their keys."""
        from transformers import DynamicCache

        from kvstored_client.integrations.transformers import PrefixCache

        carried = Carried()
        prefixes = PrefixCache(lab.model, carried.guard, chunk_tokens=_chunk(lab))
        cache = DynamicCache(config=lab.model.config)
        with torch.inference_mode():
            lab.model(lab.ids, past_key_values=cache, logits_to_keep=1)
        prefixes.commit(cache, lab.ids)
        if not prefixes.flush(60):
            raise RuntimeError("the integration did not put its chunks within 60 s")
        return carried.tensors()

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """What PrefixCache restores of a prompt that goes on by one token, which stays to be computed."""
        from kvstored_client.integrations.transformers import PrefixCache

        carried = Carried(tensors)
        prefixes = PrefixCache(lab.model, carried.guard, chunk_tokens=_chunk(lab))
        cache = prefixes.restore(torch.cat((lab.ids, lab.ids[:, :1]), dim=1))
        if cache.restored != lab.ids.shape[1]:
            raise RuntimeError(f"{cache.restored} of {lab.ids.shape[1]} tokens were restored")
        return stepper(lab.model, cache, cache.restored)


class EightBit(Baseline):
    """The store's int8: blocks of 64 values under one scale."""

    row = 8
    name = "8-bit"
    category = "quantization"
    source = "kvstored codec int8"
    policy = CodecPolicy("int8")


class EightBitByError(EightBit):
    """8 bits because a bound on the error asks for them: nf4-kv is tried first, and is not within 5% of the content."""

    row = 9
    name = "8-bit-by-error"
    source = "kvstored max_relative_error"
    policy = CodecPolicy("auto", max_relative_error=0.05)


class FourBit(EightBit):
    """The store's default below hot: keys without their mean, values in small blocks, NF4 levels."""

    row = 10
    name = "4-bit"
    source = "kvstored codec nf4-kv"
    policy = CodecPolicy("nf4-kv")


class PlainNF4(EightBit):
    """NF4 as bitsandbytes has it: what nf4-kv is measured against."""

    row = 26
    name = "4-bit-plain-nf4"
    source = "arXiv 2305.14314, kvstored codec nf4"
    policy = CodecPolicy("nf4")


class GroupedQuery(Baseline):
    """The model's own grouped heads: several query heads read one head of K and V."""

    row = 12
    name = "grouped-query-attention"
    category = "attention"
    source = "arXiv 2305.13245"
    kept = "faithful: the model was trained with grouped heads, so this is the baseline's state"

    def notes(self, lab: Lab) -> str:
        """How many heads."""
        config = lab.model.config
        q, kv = config.num_attention_heads, config.num_key_value_heads
        return f"{q} query heads share {kv} heads of K and V: {q / kv:.0f}x less than multi-head attention would hold"


class MultiHead(GroupedQuery):
    """What the store would hold had the model as many heads of K and V as of queries."""

    row = 30
    name = "multi-head-attention"
    kept = "the model's own heads repeated: what multi-head attention would hold; zstd finds the copies"

    def state(self, lab: Lab) -> Tensors:
        """Each head as often as query heads read it."""
        times = _group(lab)
        return keys_and_values(*(x.repeat_interleave(times, 2) for x in lab.prefix))

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """One of each."""
        times = _group(lab)
        return lab.step(tensors["k"][:, :, ::times], tensors["v"][:, :, ::times])

    def notes(self, lab: Lab) -> str:
        """Nothing."""
        del lab
        return ""


class OneHead(MultiHead):
    """Heads of K and V pooled to their mean: multi-query attention from a grouped model."""

    row = 31
    name = "grouped-query-pooled"
    kept = "one head by mean pooling of the weights, without the training after it that the paper does"

    def state(self, lab: Lab) -> Tensors:
        """The one head that is left."""
        k, v = lab.prefill(lab.ids, _pooled(lab.model))
        return keys_and_values(k[:, :, :1], v[:, :, :1])

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The pooled model, its head repeated."""
        heads = int(lab.model.config.num_key_value_heads)
        k, v = (tensors[n].expand(-1, -1, heads, -1) for n in ("k", "v"))
        return lab.step(k, v, model=_pooled(lab.model))


class AdaptiveBits(Baseline):
    """Bits by layer: early layers, whose values do the most harm, in int8, the others in nf4-kv."""

    row = 34
    name = "adaptive-bits"
    category = "roadmap"
    source = "kvstored store.warm.layers"
    kept = "ours: layers 0 to 2 at 8 bits, the others at 4"
    policy = CodecPolicy("nf4-kv", layers={"0-2": LayerCodec("int8")})


class TwoModels(Baseline):
    """Two models' states of one text in one entry of one daemon: attention's K and V, and a recurrent state.

    A whole run has more: each strategy is a namespace, with a codec of its own, of one of five models.
    """

    row = 39
    name = "multi-model"
    category = "roadmap"
    source = "kvstored namespaces"
    kept = "ours: the lab's model beside the taught RWKV; the figures are those of the first"

    def state(self, lab: Lab) -> Tensors:
        """Both."""
        from experiments.recurrent import RWKV

        recurrent = {f"rwkv.{name}": x for name, x in RWKV().state(_bytes_of(lab)).items()}
        return {**super().state(lab), **recurrent}

    def resume(self, lab: Lab, tensors: Tensors) -> Step:
        """The first. Raises RuntimeError where the second does not go on as it would have without the store."""
        from experiments.recurrent import RWKV

        own = {name.removeprefix("rwkv."): x for name, x in tensors.items() if name.startswith("rwkv.")}
        there, here = _bytes_of(lab), RWKV().state(_bytes_of(lab))
        if not all(torch.equal(own[name], x) for name, x in here.items()):
            raise RuntimeError("the second model's state is not what it was")
        RWKV().resume(there, own)(there.rest)
        return super().resume(lab, tensors)

    def notes(self, lab: Lab) -> str:
        """How large each is."""
        from experiments.recurrent import RWKV

        sizes = [
            sum(x.numel() * x.element_size() for x in state.values())
            for state in (super().state(lab), RWKV().state(_bytes_of(lab)))
        ]
        return f"{sizes[0]:,} B of K and V beside {sizes[1]:,} B of RWKV's state, both back bit for bit"


def _chunk(lab: Lab) -> int:
    """Tokens of a chunk, at most 64, that cut the prefix evenly: an uneven end is found by its own prompt only."""
    return math.gcd(int(lab.ids.shape[1]), 64)


def _bytes_of(lab: Lab) -> Lab:
    """The document's text as bytes, for a model that reads those: the first 64 of the prefix, 4 of the continuation."""
    text = lab.tokenizer.decode(lab.ids[0]).encode()
    return Lab(None, None, torch.tensor([list(text[:64])]), torch.tensor([list(text[64:68])]), ())


def _group(lab: Lab) -> int:
    return int(lab.model.config.num_attention_heads) // int(lab.model.config.num_key_value_heads)


@lru_cache(maxsize=1)
def _pooled(model: Any) -> Any:
    """A copy of the model whose heads of K and V all are their mean."""
    found = copy.deepcopy(model)
    heads = int(model.config.num_key_value_heads)
    for layer in found.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            weight = projection.weight.data.unflatten(0, (heads, -1))
            weight.copy_(weight.mean(0, keepdim=True).expand_as(weight))
    return found
