"""A KvstoredConnector whose blocks are always there at the lookup and always gone at the load: for run_vllm.py."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvstored_client.integrations.vllm import KvstoredConnector

logger = logging.getLogger("vllm.lossy")


class LossyConnector(KvstoredConnector):
    """Answers lookups truthfully and misses every get."""

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        # The connector's name is in the keys: with this one's nothing would be found that could be lost.
        vllm_config.kv_transfer_config.kv_connector = "KvstoredConnector"
        vllm_config.kv_transfer_config.kv_connector_module_path = "kvstored_client.integrations.vllm"
        super().__init__(vllm_config, *args, **options)
        self._guard.lease_many = gone  # type: ignore[method-assign,assignment]  # the fault


@contextmanager
def gone(keys: Sequence[bytes], **_: Any) -> Iterator[list[None]]:
    """What a lease of keys that have left gives. Says so, for whoever has to know that it happened."""
    logger.warning("lost %d chunks", len(keys))
    yield [None] * len(keys)
