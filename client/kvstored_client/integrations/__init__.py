"""kvstored inside the engines people run: one module an engine, each imported only where its engine is installed.

Every one of them speaks to the cache through `guard.Guard`: whatever the cache does, the engine sees a miss, in time.
"""
