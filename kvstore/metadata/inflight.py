"""Work under way outside the store's lock, one piece a key, and the tombstones that call it off.

A promotion reads, decodes and makes room without holding the lock. Meanwhile the key may be deleted or replaced: then
what was decoded is another value's bytes and must not be installed. Who deletes or replaces leaves a tombstone on the
flight; who flies asks, under the store's lock, before installing. One flight a key: a second would do the same work.
Not thread-safe: the store's lock covers each call.
"""

from dataclasses import dataclass

from kvstore.keys import Key


@dataclass(slots=True)
class Flight:
    """One piece of work on a key. called_off: the value it started from is gone."""

    key: Key
    called_off: bool = False


class InFlight:
    """Flights by key."""

    def __init__(self) -> None:
        self._flights: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def start(self, key: Key) -> Flight | None:
        """A new flight; None when one for this key is under way."""
        if key in self._flights:
            return None
        flight = self._flights[key] = Flight(key)
        return flight

    def call_off(self, key: Key) -> None:
        """Leave a tombstone: the flight of this key, if any, must not install its result."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.called_off = True

    def finish(self, flight: Flight) -> None:
        """The flight is over."""
        del self._flights[flight.key]
