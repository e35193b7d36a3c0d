"""Who we are to a shared store: a small TOML file that only its owner (and group) may read.

username = "kvstored"          access_key_id = "..."
password = "..."               secret_access_key = "..."
                               session_token = "..."      # where there is one
"""

import difflib

from kvstore.config import read_toml
from kvstore.errors import ConfigError
from kvstore.ownership import check_private

WHAT = "store.shared.credentials_file"
VALKEY = ("username", "password")
S3 = ("access_key_id", "secret_access_key", "session_token")


def read(path: str, names: tuple[str, ...], required: tuple[str, ...]) -> dict[str, str]:
    """The values of a file. Raises ConfigError, without any of them."""
    try:
        check_private(path, WHAT, secret=True)
    except OSError as error:
        raise ConfigError(f"{WHAT}: cannot read {path}: {error.strerror}") from None
    try:
        table = read_toml(path)
    except ConfigError as error:
        # What TOML says of a line may quote it.
        raise ConfigError(
            f'{WHAT}: {path} is not read: it is TOML, lines like {required[-1]} = "..."'
        ) from error.__cause__
    for name, value in table.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
            raise ConfigError(f"{WHAT}: {path} has an unknown name; {hint}")
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{WHAT}: {name} in {path} must be text that is not empty")
    missing = [name for name in required if name not in table]
    if missing:
        raise ConfigError(f"{WHAT}: {path} lacks {missing[0]}")
    return table
