"""Build hook: compiles the library before the wheel is put together, and names the systems that the wheel is for."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

POLICIES = (
    ((2, 17), (3, 4, 19), (1, 3, 7)),
    ((2, 24), (3, 4, 22), (1, 3, 10)),
    ((2, 27), (3, 4, 24), (1, 3, 11)),
    ((2, 31), (3, 4, 28), (1, 3, 12)),
    ((2, 34), (3, 4, 29), (1, 3, 13)),
    ((2, 35), (3, 4, 30), (1, 3, 13)),
)
"""glibc, GLIBCXX, CXXABI: the newest symbols that a system of this glibc is sure to have, as auditwheel lists them."""
LIBRARIES = re.compile(r"lib(c|m|pthread|gcc_s|stdc\+\+)\.so\.\d+$|ld-linux")
"""Which every such system has."""


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs compile.sh with the compiler named by CXX (c++ by default)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for any Python 3 on the systems that can load the library."""
        del version
        root = Path(self.root)
        out = root / "kvstored_kernel" / "libkvstored_kernel.so"
        subprocess.run(["sh", str(root / "compile.sh"), str(out)], check=True, env=os.environ)  # noqa: S603, S607
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform(*needs(out), machine())}"


def machine() -> str:
    """What the compiler makes code for: x86_64, aarch64. A cross-compiler's target, not this host."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-dumpmachine"]
    target = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
    return target.split("-")[0] if target.endswith("-gnu") else ""


def needs(library: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The newest version of each kind of symbol (GLIBC, GLIBCXX, CXXABI) that a library needs, and its libraries."""
    if shutil.which("readelf") is None:
        return {}, []
    told = subprocess.run(  # noqa: S603
        ["readelf", "--wide", "--version-info", "--dynamic", str(library)],  # noqa: S607
        check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
    ).stdout  # fmt: skip
    found: dict[str, tuple[int, ...]] = {}
    for kind, text in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", told):
        found[kind] = max(found.get(kind, ()), tuple(map(int, text.split("."))))
    return found, re.findall(r"\(NEEDED\).*\[(.+)\]", told)


def platform(found: dict[str, tuple[int, ...]], libraries: list[str], target: str) -> str:
    """The oldest manylinux that has all of it; where none does, or nothing is known, this host's own tag."""
    if target and libraries and all(map(LIBRARIES.match, libraries)):
        kinds = ("GLIBC", "GLIBCXX", "CXXABI")
        for policy in POLICIES:
            if all(found.get(kind, ()) <= newest for kind, newest in zip(kinds, policy, strict=True)):
                return "manylinux_{}_{}_{}".format(*policy[0], target)
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
