"""kvstored_client: the cache from inside an inference worker. Light: no torch, no engine, one connection."""

from kvstored_client.client import Client

__all__ = ["Client"]
