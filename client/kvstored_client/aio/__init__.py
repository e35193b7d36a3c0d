"""The cache for asyncio servers: `Client` has the verbs of `kvstored_client.Client`, to be awaited.

    async with Client() as cache:
        await cache.put(b"key", {"k": k, "v": v})
        hit = await cache.get(b"key")               # None on a miss
        async with cache.lease(b"key") as hit: ...
        async for entry in cache.entries(): ...

The loop waits for the daemon's small answers itself; copies over 256 KiB, and decoding, are done by one thread. So a
get of 16 MiB holds the loop for less than 2 ms. A call that is cancelled writes to the caller's tensors no more, leaves
no connection with an answer to come, and its lease is given back; a put that is cancelled may have been stored.
One event loop at a time; a forked child connects anew.
"""

from kvstored_client.aio.client import Client, Namespace

__all__ = ["Client", "Namespace"]
