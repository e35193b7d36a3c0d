"""Torture of the cold tier. Every trial prints a seed; KVSTORED_TORTURE_SEED=<seed> runs just that trial again.

KVSTORED_TORTURE=<n> runs n times the trials (`make torture`).
"""
