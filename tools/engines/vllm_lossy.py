"""A KvstoredConnector whose blocks are always there at the lookup and always gone at the load: for run_vllm.py."""

from typing import Any

from kvstored_client.integrations.vllm import KvstoredConnector


class LossyConnector(KvstoredConnector):
    """Answers lookups truthfully and misses every get."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard.get_many = lambda keys, **_: [None] * len(keys)  # type: ignore[method-assign]  # the fault
