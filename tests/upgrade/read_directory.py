"""What a store finds in a directory, by whichever version is on the path: JSON of digests, or the refusal.

python tests/upgrade/read_directory.py DIRECTORY SEAL_KEY_FILE [KEY TO DELETE AFTERWARDS] ...
"""

import hashlib
import json
import sys

from contents import TENANT, TENANT_PREFIX, TTL_MAX_S, TTL_S

import kvstore
from kvstore.config import ColdConfig, StoreConfig
from kvstore.errors import ConfigError
from kvstore.store import Store


def main() -> None:
    """From the command line."""
    path, seal_key, *deleted = sys.argv[1:]
    cold = ColdConfig(path=path, key_files={"nobody": seal_key})
    try:
        store = Store.open(
            StoreConfig(cold=cold, ttl_s=TTL_S, ttl_max_s=TTL_MAX_S),
            framework="numpy", background=False, tenants={TENANT: [TENANT_PREFIX]},
        )  # fmt: skip
    except ConfigError as error:
        json.dump(str(error), sys.stdout)
        return
    with store:
        hits = {info.key: store.get(info.key) for info in list(store.entries())}
        found = {
            key.decode(): hit and {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in hit.tensors.items()}
            for key, hit in hits.items()
        }
        store.delete(*(key.encode() for key in deleted))
        json.dump({**found, "version": kvstore.__file__}, sys.stdout)


if __name__ == "__main__":
    main()
