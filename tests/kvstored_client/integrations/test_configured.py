"""An identity is a digest over everything configured: equal for equal configurations anywhere, else another."""

import ctypes
import dataclasses
import datetime as dt
import enum
import functools
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstored_client.integrations import configured
from kvstored_client.integrations.adapters import Unknown, salt_of
from kvstored_client.integrations.configured import NoStableForm
from tests.conftest import environment


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Level(enum.IntEnum):
    ONE = 1


@dataclasses.dataclass
class Inner:
    rank: int = 0
    dtype: Any = torch.float8_e4m3fn
    names: frozenset[str] = frozenset({"a", "b", "c"})


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    kind: Kind = Kind.ONE
    table: dict[str, Any] = dataclasses.field(default_factory=lambda: {"x": 1, "y": [1.5, None]})

    @functools.cached_property
    def derived(self) -> int:
        return self.inner.rank + 1


class Slotted:
    __slots__ = ("layout",)

    def __init__(self, layout: str) -> None:
        self.layout = layout


def digest(x: Any, harmless: dict[str, str] | None = None) -> bytes:
    return configured.digest("test", {"x": x}, harmless)


def test_every_field_at_any_depth_makes_another_digest() -> None:
    changes: list[Any] = [
        Outer(),
        Outer(Inner(rank=1)),
        Outer(Inner(dtype=torch.float8_e5m2)),
        Outer(Inner(names=frozenset({"a", "b"}))),
        Outer(kind=Kind.TWO),
        Outer(table={"x": 1, "y": [1.5, 0]}),
        Outer(table={"x": 1, "y": [1.5, None], "z": None}),
    ]
    assert len({digest(x) for x in changes}) == len(changes)


def test_a_field_that_nobody_has_heard_of_is_in_the_digest() -> None:
    later = Outer()
    later.invented = 1  # type: ignore[attr-defined]
    assert digest(later) != digest(Outer())
    assert digest(Slotted("NHD")) != digest(Slotted("HND"))
    assert digest(SimpleNamespace(a=1, b=2)) != digest(SimpleNamespace(a=1))


def test_a_field_that_pydantic_keeps_beside_the_others_is_in_the_digest() -> None:
    pydantic = pytest.importorskip("pydantic", reason="an engine brings it")
    allows = pydantic.create_model("Allows", __config__=pydantic.ConfigDict(extra="allow"), heads=(int, 4))
    assert digest(allows(heads=4)) == digest(allows())
    assert len({digest(allows()), digest(allows(heads=5)), digest(allows(invented=1))}) == 3


def test_values_of_other_types_are_other_values() -> None:
    values = [
        1, 1.0, True, "1", b"1", None, "None", Kind.ONE, Level.ONE, [1], {1: 1}, {"1": 1}, {1}, Path("1"),
        torch.float16, "torch.float16", torch.tensor([1]), torch.tensor([1.0]), int, dt.date(2026, 1, 1),
        re.compile("1"), functools.partial(int, 1), float("nan"), [[1], []], [[], [1]],
    ]  # fmt: skip
    for one, other in itertools.combinations(values, 2):
        assert digest(one) != digest(other), (one, other)


def test_what_is_named_as_harmless_is_left_out_of_its_class_and_of_no_other() -> None:
    harmless = {"Inner.rank": "in the key", "table.x": "a port"}
    assert digest(Outer(Inner(rank=1), table={"x": 2, "y": [1.5, None]}), harmless) == digest(Outer(), harmless)
    assert digest(SimpleNamespace(rank=1), harmless) != digest(SimpleNamespace(rank=2), harmless)
    assert digest(SimpleNamespace(other={"x": 1}), harmless) != digest(SimpleNamespace(other={"x": 2}), harmless)
    anywhere = {"*.rank": "in the key"}
    assert digest([Inner(1), SimpleNamespace(rank=1)], anywhere) == digest(
        [Inner(2), SimpleNamespace(rank=2)], anywhere
    )


def test_a_property_that_was_asked_for_changes_nothing() -> None:
    asked = Outer()
    assert asked.derived == 1
    assert digest(asked) == digest(Outer())


class PerLayer:
    """As transformers' configurations whose layers differ: a field is held, and an error where it is read."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def __getattribute__(self, name: str) -> Any:
        if name == "head_dim":
            raise RuntimeError("'head_dim' is a per-layer attribute")
        return super().__getattribute__(name)


def test_a_field_that_its_class_does_not_let_be_read_is_in_the_digest_as_it_is_held() -> None:
    assert digest(PerLayer(64)) == digest(PerLayer(64)) != digest(PerLayer(128))


@pytest.mark.parametrize("kind", ["gemma4_text", "qwen2_vl", "llama4", "deepseek_v3", "mamba2", "whisper"])
def test_configurations_of_transformers_have_a_stable_form(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 128}

    def made(**fields: Any) -> Any:
        return transformers.AutoConfig.for_model(kind, dtype=torch.bfloat16, quantization_config=quantized, **fields)

    assert digest(made()) == digest(made()) != digest(made(invented_by_a_later_version=1))
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert digest(made(scaled=scaled)) != digest(made(scaled={**scaled, "factor": 8.0}))


class Unreadable(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("gone")


def test_what_cannot_be_read_is_no_exception_of_another_kind() -> None:
    with pytest.raises(NoStableForm, match=r"x\.inner\.rank cannot be read: RuntimeError: gone"):
        digest(Outer(Inner(rank=Unreadable())))  # type: ignore[arg-type]


def test_an_object_inside_itself_has_a_digest_and_ends() -> None:
    ring = SimpleNamespace(name="a")
    ring.self = ring
    other = SimpleNamespace(name="b")
    other.self = other
    assert len({digest(ring), digest(other)}) == 2


@pytest.mark.parametrize(
    "value",
    [
        lambda: 1,
        threading.Lock(),
        object(),
        (i for i in range(0)),
        torch.nn.Linear(3000, 3000),
        functools.partial(lambda: 1),
    ],
    ids=["lambda", "lock", "object", "generator", "weights", "partial of a lambda"],
)
def test_what_has_no_stable_form_is_refused_and_the_error_says_where(value: Any) -> None:
    with pytest.raises(NoStableForm, match=r"x\.inner\.rank"):
        digest(Outer(Inner(rank=value)))
    # Named as harmless it is not looked at.
    assert digest(Outer(Inner(rank=value)), {"Inner.rank": "in the key"})


def test_a_configuration_of_a_million_values_is_refused() -> None:
    with pytest.raises(NoStableForm, match="over 200000 values"):
        digest(list(range(1_000_000)))


def test_the_digest_is_that_of_every_other_process() -> None:
    """Sets and dicts come in another order there, and objects lie elsewhere."""
    code = (
        "from tests.kvstored_client.integrations import test_configured as t; import torch;"
        "print(t.digest(t.Outer(table={'s': {'a', 'b', 'c', 'd'}, 'f': len, 'c': t.Inner, 't': torch.ones(2)})).hex())"
    )
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(PYTHONHASHSEED=seed), capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        found.add(done.stdout.strip())
    own = Outer(table={"t": torch.ones(2), "c": Inner, "f": len, "s": {"d", "c", "b", "a"}})
    assert found == {digest(own).hex()}


def test_a_pool_is_told_by_its_plain_attributes() -> None:
    class Pool:
        layout = "page_first"
        dtype = torch.uint8
        size = 100

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.buffer = torch.zeros(4)
            self.shape = (2, 3)

    harmless = {"*.size": "memory"}
    facts = configured.plain_attributes(Pool(), harmless)
    assert facts == {"class": Pool.__qualname__, "layout": "page_first", "dtype": torch.uint8, "shape": (2, 3)}
    other = Pool()
    other.invented = "swizzled"  # type: ignore[attr-defined]
    assert configured.plain_attributes(other, harmless) != facts


class Deep(ctypes.Structure):
    _fields_ = (("beta", ctypes.c_float),)


class Params(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32), ("type_k", ctypes.c_int), ("flash_attn", ctypes.c_bool), ("deep", Deep),
        ("shares", ctypes.c_float * 2), ("callback", ctypes.c_void_p), ("n_threads", ctypes.c_int32),
        ("name", ctypes.c_char_p),
    )  # fmt: skip


def test_a_c_structure_is_all_of_its_fields_and_a_pointer_that_is_set_is_refused() -> None:
    harmless = {"*.n_threads": "how fast"}

    def numbers(**fields: Any) -> Any:
        params = Params()
        for name, x in fields.items():
            setattr(params, name, x)
        return configured.canonical(configured.c_numbers(params, harmless))

    changes: list[dict[str, Any]] = [
        {}, {"n_ctx": 1}, {"type_k": 8}, {"flash_attn": True}, {"deep": Deep(0.5)},
        {"shares": (ctypes.c_float * 2)(0.5, 0.5)}, {"name": b"gpu"},
    ]  # fmt: skip
    found = [numbers(**each) for each in changes]
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert numbers(n_threads=8) == numbers()
    with pytest.raises(NoStableForm, match="Params.callback"):
        numbers(callback=1)


def lora(path: Path, **more: Any) -> Any:
    return SimpleNamespace(lora_request=SimpleNamespace(lora_name="a", lora_path=str(path), **more))


def test_an_adapter_is_its_files_and_not_its_name(tmp_path: Path) -> None:
    folders = []
    for name, weights in (("one", b"w"), ("two", b"v"), ("three", b"w")):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "adapter_model.safetensors").write_bytes(weights)
    one, two, three = (salt_of(lora(folder)) for folder in folders)
    assert one == three != two
    assert salt_of(SimpleNamespace(lora_request=None)) == b""
    assert salt_of(lora(folders[0])) == one


def test_an_adapter_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="cannot be read here"):
        salt_of(lora(tmp_path / "some-org" / "some-adapter"))
    with pytest.raises(Unknown, match="in place"):
        salt_of(lora(tmp_path, load_inplace=True))
    with pytest.raises(Unknown, match="got 0"):
        salt_of(lora(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"old")
    assert salt_of(lora(tmp_path))
    weights.write_bytes(b"new!")
    os.utime(weights, (1, 1))
    with pytest.raises(Unknown, match="changed since"):
        salt_of(lora(tmp_path))
