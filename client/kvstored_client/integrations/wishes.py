"""What a request wishes for its blocks. vLLM's: in `kv_transfer_params` or as an action "kvstored" of `kv_hints`.

    kv_transfer_params={"kvstored": {"ttl_s": 600, "priority": "low", "no_store": true, "pin": true}}

LMCache's: the same names among `request_configs`, each behind "kvstored.". Whoever sends requests can write these, so
`pin` is heard only where the connector's settings have `allow_pin`. Wishes that no store would accept are told in the
log and left out; the request runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import InvalidEntry
from kvstore.options import PutOptions

NAME = "kvstored"
_KINDS: dict[str, type | tuple[type, ...]] = {"ttl_s": (int, float), "priority": str, "pin": bool, "no_store": bool}


@dataclass(frozen=True, slots=True)
class Wishes:
    """store: whether its blocks are kept at all. options: of the puts. complaint: why wishes are left out; "": none."""

    store: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    complaint: str = ""


def wishes_of(request: Any, *, allow_pin: bool) -> Wishes:
    """Those of a request of vLLM's."""
    return wishes_in(_sources(request), allow_pin=allow_pin)


def wishes_in(sources: Iterable[Any], *, allow_pin: bool) -> Wishes:
    """Those of tables of wishes. Never raises: what a request says is its caller's, who may be anybody."""
    try:
        given = {name: value for wish in _wishes(sources) for name, value in wish}
        if given.get("pin") and not allow_pin:
            raise InvalidEntry("requests may not pin here: allow_pin is not set")
        store = not given.pop("no_store", False)
        PutOptions(**given)
    except InvalidEntry as error:
        return Wishes(complaint=str(error)[:200])
    return Wishes(store, given)


def _wishes(sources: Iterable[Any]) -> Iterator[list[tuple[str, Any]]]:
    """The wishes of each source, names and types checked. Raises InvalidEntry."""
    for source in sources:
        if not isinstance(source, Mapping):
            raise InvalidEntry(f"{NAME} must be a table of wishes, got {type(source).__name__}")
        for name, value in source.items():
            kind = _KINDS.get(name) if isinstance(name, str) else None
            if kind is None:
                raise InvalidEntry(f"no wish is called {name!r:.40}: there are {', '.join(_KINDS)}")
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise InvalidEntry(f"{name} cannot be {value!r:.40}")
        yield list(source.items())


def _sources(request: Any) -> Iterator[Any]:
    params = getattr(request, "kv_transfer_params", None)
    if isinstance(params, Mapping) and NAME in params:
        yield params[NAME]
    for action in getattr(getattr(request, "kv_hints", None), "actions", None) or ():
        if getattr(action, "action_type", "") == NAME:
            yield action.payload
