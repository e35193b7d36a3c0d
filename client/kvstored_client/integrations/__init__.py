"""Adapters of kvstored for inference engines: one module per engine, imported only if its engine is installed.

Every adapter calls the cache through `guard.Guard`: if the cache fails or is late, the engine sees a miss in time.
"""
