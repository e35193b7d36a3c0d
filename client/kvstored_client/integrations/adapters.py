"""What a request brings that vLLM's block hashes do not cover: the bytes of its LoRA adapter.

vLLM hashes an adapter's name and path. Both stay when its files are written anew, and are the same on two hosts with
different files; the blocks are not. So the files are read, once. Files that change afterwards are an error until the
engine starts anew: nothing says whether it computes with the old ones or has read the new ones. Thread-safe.
"""

import hashlib
from pathlib import Path
from typing import Any

import xxhash

FILES_MAX = 64
"""An adapter has two to ten; a folder of more is something else."""
Version = tuple[tuple[str, int, int, int], ...]
"""Of each file its path, size, time of change and inode."""
_known: dict[Path, tuple[Version, bytes]] = {}


class Unknown(ValueError):
    """What a request computes with cannot be told from its description. The message says why."""


def salt_of(request: Any) -> bytes:
    """What must be added to a request's block hashes: 32 bytes, or none without an adapter. Raises Unknown."""
    lora = getattr(request, "lora_request", None)
    if lora is None:
        return b""
    if getattr(lora, "load_inplace", False):
        raise Unknown(f"LoRA {lora.lora_name!r} replaces a loaded adapter in place: blocks of both have one name")
    return hashlib.sha256(b"lora" + _fingerprint(Path(str(lora.lora_path)))).digest()


def _fingerprint(folder: Path) -> bytes:
    """XXH3-128 of an adapter's files, names included."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files or len(files) > FILES_MAX:
            raise Unknown(f"LoRA {folder}: an adapter is 1 to {FILES_MAX} files, got {len(files)}")
        version = _version(files)
        known = _known.get(folder)
        if known is None:
            known = _known[folder] = (version, _read(files))
        if known[0] != _version(files):
            raise Unknown(f"LoRA {folder}: its files have changed since they were first used")
    except OSError as error:
        raise Unknown(f"LoRA {folder} cannot be read here: {error}") from None
    return known[1]


def _version(files: list[Path]) -> Version:
    found = [(path, path.stat()) for path in files]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found)


def _read(files: list[Path]) -> bytes:
    found = xxhash.xxh3_128()
    for path in files:
        found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                found.update(piece)
    return found.digest()
