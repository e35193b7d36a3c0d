"""One pass over a model: everything that decides what it computes, in a form that compares and prints by content.

Every module's class and the code of its forward, every attribute (an adapter's scaling, which adapters are on), the
configuration, and every tensor by its place. `unchanged` asks whether a second pass would find the same, at a tenth of
the cost. Fails closed: what cannot be read off (hooks, replaced methods, objects of unknown kinds, dropout) raises
NotCacheable. The few attributes that are known to change nothing are listed.
"""

import enum
import functools
import re
import sys
import types
import weakref
from collections import deque
from operator import is_, itemgetter
from typing import Any

import torch
import xxhash
from transformers.configuration_utils import PretrainedConfig

from kvstored_client.integrations.transformers import code
from kvstored_client.integrations.transformers.weights import Named, check_readable

_OF_TORCH = frozenset(vars(torch.nn.Module()))
"""A bare module's own attributes: hooks, parameters, buffers, children. Each is looked at in its own way."""
_INERT = frozenset({
    "generation_config",  # merged at each call
    "generate",  # the one line itself
    "name_or_path", "_auto_class", "model_tags", "warnings_issued", "_is_hf_initialized", "_commit_hash",
    "_output_capturing_hooks_installed", "_hf_peft_config_loaded", "_load_report", "hf_device_map",
    "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules", "_tied_weights_keys",
    "all_tied_weights_keys", "_dynamic_tied_weights_keys", "_skip_keys_device_placement", "_tp_plan", "_tp_size",
    "_ep_plan", "_pp_plan", "_parameter_conversions", "_weight_conversions",
    "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks",
    "peft_config",  # what of it counts stands on the adapter's layers
})  # fmt: skip
"""Attributes of modules and parameters that do not change what is computed."""
_INERT_CONFIG = frozenset({
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache", "_commit_hash",
    "output_hidden_states", "_output_attentions", "return_dict", "torch_dtype", "id2label", "label2id", "problem_type",
})  # fmt: skip
"""Configuration that moves with the file or the library, not with what the model computes."""
_OURS = "transformers.utils.output_capturing"
"""Where the hooks live that transformers leaves on a model of which hidden states were asked: they only look."""
_PLAIN = (type(None), bool, int, float, str, bytes, complex)
_NAMED = (torch.dtype, torch.Size, torch.layout, torch.memory_format, enum.Enum, slice, range)
_NOTHING = (torch.device, weakref.ref, type(sys), re.Pattern)
"""Where tensors lie, and what only refers to something else."""
_OF_EACH = ("training", "_parameters", "_buffers", "_modules")
"""What is compared of every module. An id that is another only makes the next pass read the whole again."""

_EVEN_IN_TRAINING = frozenset({
    torch.nn.Linear, torch.nn.Embedding, torch.nn.Identity, torch.nn.LayerNorm, torch.nn.ModuleDict,
    torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList,
})  # fmt: skip
"""Classes that compute the same in training mode. PEFT leaves its new layers in it."""


class NotCacheable(Exception):
    """This model's keys and values cannot be told from its state; the message says why."""


class Walk:
    """One pass over a model. found: all but tensors, as nested tuples that compare and print alike in any process."""

    def __init__(self, besides: frozenset[str] = frozenset()) -> None:
        """besides: more attributes of modules that are left out."""
        self._inert = _INERT | besides
        self.found: list[Any] = []
        self.tensors: Named = {}
        self.adapters: set[int] = set()
        self._places: dict[int, int] = {}
        self._seen: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._classes: dict[type, str] = {}
        self._modules: list[_Module] = []
        self._others: list[tuple[Any, str, Any]] = []
        self._noted: set[int] = set()
        self._autocast: Any = None

    def whole(self, model: Any) -> None:
        """Read a model and what its computing depends on outside of it."""
        self._autocast = _outside_settings(model)
        self.found.append(self._autocast)
        self._module(model, "model", adapter=False)

    def unchanged(self, model: Any) -> bool:
        """Whether another pass would find the same attributes, modules and tensors. Raises NotCacheable."""
        if _outside_settings(model) != self._autocast or any(
            code.of_class(cls) != text for cls, text in self._classes.items()
        ):
            return False
        if not all(module.unchanged() for module in self._modules):
            return False
        again = Walk(self._inert)
        again._places = dict(self._places)
        same = all(again._value(x, path) == found for x, path, found in self._others)
        return same and len(again._places) == len(self._places)

    def _module(self, module: Any, path: str, *, adapter: bool) -> None:
        values = vars(module)
        if id(module) in self._places:
            self.found.append(self._places[id(module)])
            return
        self._places[id(module)] = len(self._places)
        if values["training"] and type(module) not in _EVEN_IN_TRAINING:
            raise NotCacheable(f"{path} is in training mode")
        if values["_forward_hooks"] or values["_forward_pre_hooks"]:
            _check_hooks(module, path)
        self.found.append(self._class(type(module)))
        names = []
        for name, value in values.items():
            if name in _OF_TORCH or name in self._inert:
                continue
            names.append(name)
            if type(value) in _PLAIN_TYPES:
                self.found.append((name, value))
            else:
                self._attribute(module, name, value, path)
        self._modules.append(_Module(module, names))
        for kind in ("_parameters", "_buffers"):
            for name, x in values[kind].items():
                self.found.append((name, None if x is None else self._tensor(x, f"{path}.{name}", adapter=adapter)))
        self._children(module, path, adapter=adapter)
        self.found.append("end")

    def _children(self, module: Any, path: str, *, adapter: bool) -> None:
        tuner = _is_adapter(module)
        for name, child in vars(module)["_modules"].items():
            self.found.append(name)
            if child is not None:
                inner = (adapter or tuner) and not (tuner and name == "base_layer")
                self._module(child, f"{path}.{name}", adapter=inner)

    def _class(self, cls: type) -> str:
        if cls not in self._classes:
            self._classes[cls] = code.of_class(cls)
        return self._classes[cls]

    def _attribute(self, module: Any, name: str, value: Any, path: str) -> None:
        if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
            owner = value.__self__
            if value.__func__ is getattr(type(owner), name, None) and (
                owner is module or not hasattr(type(module), name)
            ):
                return  # a class's own method: PEFT puts these on the model, and on its wrapper at the first generate
        replaces = callable(value) and not isinstance(value, torch.nn.Module) and hasattr(type(module), name)
        if replaces:
            raise NotCacheable(f"the method {name} of {path} is replaced")
        frozen = self._value(value, f"{path}.{name}")
        if id(value) not in self._noted and not isinstance(value, _NOTHING):
            self._noted.add(id(value))
            self._others.append((value, f"{path}.{name}", frozen))
        self.found.append((name, frozen))

    def _tensor(self, x: torch.Tensor, path: str, *, adapter: bool = False) -> Any:
        """A tensor's place among all; its content is read elsewhere."""
        if type(x) not in (torch.Tensor, torch.nn.Parameter) and hasattr(x, "__tensor_flatten__"):
            names, context = x.__tensor_flatten__()
            inner = [(name, self._tensor(getattr(x, name), f"{path}.{name}", adapter=adapter)) for name in names]
            return (type(x).__qualname__, tuple(inner), self._value(context, path))
        check_readable(x, path)
        self.tensors[id(x)] = x
        if adapter:
            self.adapters.add(id(x))
        extra = [(n, self._value(v, f"{path}.{n}")) for n, v in vars(x).items() if n not in _INERT]
        place = self._places.setdefault(id(x), len(self._places))
        return (place, tuple(extra)) if extra else place

    def _value(self, x: Any, path: str) -> Any:  # noqa: PLR0911 - one line for each kind
        """An attribute's value in a form that compares by content."""
        if type(x) in _PLAIN_TYPES:
            return x
        if id(x) in self._seen:
            return self._seen[id(x)]
        if isinstance(x, (*_PLAIN, *_NAMED)):
            return str(x)
        if isinstance(x, _NOTHING):
            return type(x).__name__
        if isinstance(x, torch.Tensor):
            return self._tensor(x, path)
        if isinstance(x, torch.nn.Module):
            return self._outside(x, path)
        self._seen[id(x)] = "again"
        self._kept.append(x)  # an id may not come back for something else during this pass
        self._seen[id(x)] = self._object(x, path)
        return self._seen[id(x)]

    def _outside(self, module: Any, path: str) -> int:
        """A module that is an attribute, not a child: its place among all."""
        if id(module) not in self._places:
            self._module(module, path, adapter=False)
        return self._places[id(module)]

    def _object(self, x: Any, path: str) -> Any:  # noqa: PLR0911 - one line for each kind
        if isinstance(x, (list, tuple, deque)):
            return (type(x).__name__, *(self._value(y, path) for y in x))
        if isinstance(x, (dict, types.MappingProxyType)):
            return ("dict", *((self._value(k, path), self._value(v, f"{path}[{k!r}]")) for k, v in x.items()))
        if isinstance(x, (set, frozenset)):
            return ("set", *sorted(repr(self._value(y, path)) for y in x))
        if isinstance(x, PretrainedConfig):
            own = [(k, self._value(v, f"{path}.{k}")) for k, v in sorted(vars(x).items()) if k not in _INERT_CONFIG]
            return (type(x).__name__, code.of_attention(x), *own)
        if isinstance(x, functools.partial):
            return ("partial", *(self._value(y, path) for y in (x.func, x.args, x.keywords)))
        if isinstance(x, types.MethodType):
            return ("method", self._value(x.__func__, path), self._value(x.__self__, path))
        if isinstance(x, types.FunctionType):
            held = [self._value(y.cell_contents, path) for y in x.__closure__ or ()]
            return (code.of_function(x), *held, self._value(x.__defaults__, path))
        if isinstance(x, (type, types.BuiltinFunctionType)):
            return f"{x.__module__}.{x.__qualname__}"
        if type(x).__module__ == "numpy" and hasattr(x, "tobytes"):
            return (str(x.dtype), x.shape, xxhash.xxh3_128_hexdigest(x.tobytes()))
        return self._instance(x, path)

    def _instance(self, x: Any, path: str) -> Any:
        slots = [name for cls in type(x).__mro__ for name in _slots(cls)]
        if not hasattr(x, "__dict__") and not slots:
            raise NotCacheable(f"{path} is a {type(x).__module__}.{type(x).__qualname__}, which has no readable state")
        own = {**{name: getattr(x, name, None) for name in slots}, **getattr(x, "__dict__", {})}
        values = [(k, self._value(v, f"{path}.{k}")) for k, v in own.items() if k not in _INERT]
        return (f"{type(x).__module__}.{type(x).__qualname__}", *values)


class _Module:
    """What one module was like. Holds the module and its attributes, which are compared by identity."""

    def __init__(self, module: Any, names: list[str]) -> None:
        values = vars(module)
        self._values = values
        self._module = module
        self._class = type(module)
        self._count = len(values)
        self._named = itemgetter(*_OF_EACH, *names)
        self._was = self._named(values)
        self._hooks = (values["_forward_hooks"], values["_forward_pre_hooks"])
        self._dicts = [values[kind] for kind in _OF_EACH[1:] if values[kind]]
        self._held = [(list(held), list(held.values())) for held in self._dicts]
        self._rest = [values[kind] for kind in _OF_EACH[1:] if not values[kind]]

    def unchanged(self) -> bool:
        """Whether it is still like that, its tensors' contents and its other attributes' insides aside."""
        values = self._values
        if len(values) != self._count or vars(self._module) is not values or type(self._module) is not self._class:
            return False
        try:
            if not all(map(is_, self._named(values), self._was)):
                return False
        except KeyError:
            return False
        if any(self._hooks):
            _check_hooks(self._module, self._class.__name__)
        if any(self._rest):
            return False
        for held, (names, were) in zip(self._dicts, self._held, strict=True):
            if list(held) != names or not all(map(is_, held.values(), were)):
                return False
        return True


_PLAIN_TYPES = frozenset(_PLAIN)


def _outside_settings(model: Any) -> Any:
    """What computing depends on outside of the model."""
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:  # noqa: SLF001 - torch has no other way to ask
        raise NotCacheable("there are global forward hooks")
    device = model.device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    named = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in named if name not in ("__dict__", "__weakref__")]


def _check_hooks(module: Any, path: str) -> None:
    values = vars(module)
    for hook in (*values["_forward_hooks"].values(), *values["_forward_pre_hooks"].values()):
        if getattr(hook, "__module__", None) != _OURS:
            raise NotCacheable(f"{path} has a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})")


def _is_adapter(module: Any) -> bool:
    """Whether PEFT put this layer over another one, which it calls base_layer."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and isinstance(module, peft.BaseTunerLayer)
