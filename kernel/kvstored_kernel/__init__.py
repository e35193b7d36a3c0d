"""The compiled CPU kernel of kvstored's codecs. Holds a shared library and where it lies, nothing else."""

from pathlib import Path

LIBRARY_PATH = str(Path(__file__).parent / "libkvstored_kernel.so")
"""Opened by `kvstore.kernels.cpu` with ctypes, which checks its ABI number."""
