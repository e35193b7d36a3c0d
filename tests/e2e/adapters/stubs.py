"""Stand-ins for what engines import and their storage interfaces never call.

The interfaces are then tested from the engines' own wheels without their 3 GB of dependencies. A stand-in is only used
where the real module is not installed.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from unittest.mock import MagicMock

NAMES = frozenset(
    {
        "IPython",
        "PIL",
        "aiofile",
        "aiofiles",
        "aiohttp",
        "anthropic",
        "blake3",
        "caio",
        "cbor2",
        "cloudpickle",
        "compressed_tensors",
        "cpuinfo",
        "cryptography",
        "cupy",
        "depyf",
        "diskcache",
        "einops",
        "fastapi",
        "gguf",
        "ijson",
        "lark",
        "llguidance",
        "llvmlite",
        "mcp",
        "mistral_common",
        "model_hosting_container_standards",
        "numba",
        "openai",
        "openai_harmony",
        "orjson",
        "outlines_core",
        "partial_json_parser",
        "prometheus_client",
        "prometheus_fastapi_instrumentator",
        "pybase64",
        "python_multipart",
        "setproctitle",
        "sortedcontainers",
        "starlette",
        "tiktoken",
        "traitlets",
        "triton",
        "uvicorn",
        "uvloop",
        "watchfiles",
        "xgrammar",
        "zmq",
    }
)


class _Standins(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds last: real modules come first."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        module.__name__ = spec.name
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


KVPRESS = frozenset({"datasets", "fire", "pandas", "peft"})
"""For kvpress alone: transformers looks for these too, and does more where it finds them."""


def install(*missing: str, names: frozenset[str] = NAMES) -> None:
    """From now on; what is in `missing` stays missing, for an engine that copes with that."""
    sys.meta_path.append(_Standins(names.difference(missing)))
