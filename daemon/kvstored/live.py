"""The settings in force while the daemon runs, and those that change without a restart.

SIGHUP reads the file and the environment again; `kvstored config set` changes some of them until the next SIGHUP or
restart, which take what the file says. Both apply what is in `LIVE` and name the rest.
"""

import difflib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, get_type_hints

from kvstore import config
from kvstore.config import convert, differing, leaves
from kvstore.errors import ConfigError
from kvstore.stats import Setting
from kvstored.settings import Settings

logger = logging.getLogger(__name__)

LIVE = frozenset({"server.log_level", *(f"store.{name}" for name in config.LIVE)})
"""What changes while the daemon runs. Tokens and certificates are files of their own, read again by themselves."""
BY_HAND = "config set"
"""The origin of a value that no file has."""


@dataclass(frozen=True)
class Changed:
    """What a change did. applied: by name, the values before and now. restart: what differs and needs a restart."""

    applied: Mapping[str, tuple[Any, Any]]
    restart: tuple[str, ...] = ()


class LiveSettings:
    """The settings in force. Any thread; one change at a time.

    apply: makes the live ones of other settings take effect, before it returns. read: the file's and the environment's
    settings now, and the origin of each; may raise ConfigError.
    """

    def __init__(
        self,
        settings: Settings,
        apply: Callable[[Settings], None],
        read: Callable[[], tuple[Settings, Mapping[str, str]]],
        origins: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._apply = apply
        self._read = read
        self._origins = dict(origins)
        self._changing = threading.Lock()

    @property
    def data_dir(self) -> str:
        """Where the daemon's data lies; no change without a restart."""
        return self._settings.server.data_dir

    def rows(self) -> list[Setting]:
        """Every setting, in the order of the file's reference."""
        return [
            Setting(name, value, self._origins.get(name, "default"), name in LIVE)
            for name, value in leaves(self._settings)
        ]

    def change(self, asked: Mapping[str, str]) -> Changed:
        """Set some, given as text. Raises ConfigError, and changes nothing, for a bad name or value or a fixed one."""
        with self._changing:
            wanted = self._settings
            for name, text in asked.items():
                wanted = with_setting(wanted, name, text)
            fixed = sorted(set(asked) - LIVE)
            if fixed:
                raise ConfigError(
                    f"{', '.join(fixed)} needs a restart: set it in the file and restart the daemon; "
                    f"while it runs these can change: {', '.join(sorted(LIVE))}"
                )
            return self._take(wanted, dict.fromkeys(asked, BY_HAND))

    def reread(self) -> Changed:
        """Take the file and the environment as they are now. Raises ConfigError, and changes nothing, for a mistake."""
        with self._changing:
            wanted, origins = self._read()
            restart = tuple(name for name in differing(self._settings, wanted) if name not in LIVE)
            live = self._settings
            for name, value in leaves(wanted):
                if name in LIVE:
                    live = with_setting(live, name, value)
            return replace(self._take(live, {name: origins.get(name, "default") for name in LIVE}), restart=restart)

    def _take(self, wanted: Settings, origins: Mapping[str, str]) -> Changed:
        before, now = dict(leaves(self._settings)), dict(leaves(wanted))
        changed = {name: (before[name], value) for name, value in now.items() if value != before[name]}
        if changed:
            self._apply(wanted)
        self._settings = wanted
        self._origins.update(origins)
        for name, (old, new) in changed.items():
            logger.info("setting changed name=%s from=%s to=%s origin=%s", name, old, new, self._origins[name])
        return Changed(changed)


def with_setting(settings: Any, name: str, value: object, where: str = "") -> Any:
    """Settings with one of them changed, checked as a file's are. value: as in the file, or as text."""
    head, _, rest = name.partition(".")
    hints = get_type_hints(type(settings))
    inner = getattr(settings, head) if head in hints else None
    if (head not in hints) or (is_dataclass(inner) != bool(rest)):
        known = [where + one for one, _ in leaves(settings)]
        close = difflib.get_close_matches(where + name, known, n=1, cutoff=0.4)
        raise ConfigError(f"unknown setting {where}{name}" + (f"; did you mean {close[0]}?" if close else ""))
    if rest:
        return replace(settings, **{head: with_setting(inner, rest, value, f"{where}{head}.")})
    return replace(settings, **{head: convert(hints[head], value, where + name)})
