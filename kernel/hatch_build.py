"""Build hook: compiles the library before the wheel is put together."""

import os
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs compile.sh with the compiler named by CXX (c++ by default)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform and any Python 3."""
        del version
        root = Path(self.root)
        out = root / "kvstored_kernel" / "libkvstored_kernel.so"
        subprocess.run(["sh", str(root / "compile.sh"), str(out)], check=True, env=os.environ)  # noqa: S603, S607
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
