"""kvstored_client: the cache from inside an inference worker. Light: no torch, no engine, one connection.

`Client`, what it returns (`Hit`), the same for asyncio (`aio`), the errors and `__version__`; each is imported when it
is first asked for.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore import errors
    from kvstore.hit import Hit
    from kvstored_client import aio
    from kvstored_client.client import Client

    __version__: str

__all__ = ["Client", "Hit", "__version__", "aio", "errors"]

_FROM = {
    "Client": ("kvstored_client.client", "Client"),
    "Hit": ("kvstore.hit", "Hit"),
    "aio": ("kvstored_client.aio", ""),
    "errors": ("kvstore.errors", ""),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        try:
            return version("kvstored")
        except PackageNotFoundError:
            return "unknown"  # run from a clone that is not installed
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _FROM[name]
    found = import_module(module)
    globals()[name] = found = getattr(found, attribute) if attribute else found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
