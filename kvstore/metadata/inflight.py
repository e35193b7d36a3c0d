"""Work outside the store's lock, at most one flight per key, and how a delete or a put cancels it.

A promotion reads, decodes and makes room without holding the lock. Meanwhile the key may be deleted or replaced: then
the decoded bytes are of an older value and must not be installed. A delete or a put marks the flight as called off, and
the promotion checks the mark, under the store's lock, before it installs. A second flight would do the same work.
Not thread-safe: the store's lock covers each call.
"""

from dataclasses import dataclass

from kvstore.keys import Key


@dataclass(slots=True)
class Flight:
    """Work in progress on one key. called_off: the value it started from is gone."""

    key: Key
    called_off: bool = False


class InFlight:
    """Flights by key."""

    def __init__(self) -> None:
        self._flights: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def start(self, key: Key) -> Flight | None:
        """A new flight; None if there is one for this key already."""
        if key in self._flights:
            return None
        flight = self._flights[key] = Flight(key)
        return flight

    def call_off(self, key: Key) -> None:
        """Mark the flight of this key, if any, so that it does not install its result."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.called_off = True

    def finish(self, flight: Flight) -> None:
        """End a flight."""
        del self._flights[flight.key]
