"""Limits of settings: refused early, the value and the limit in the message. Pure."""

from collections.abc import Sequence

from kvstore.errors import ConfigError


def check_range(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError, with the value and the limits, unless low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be from {low} to {high}, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ConfigError, naming the choices, unless value is one of them."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
