"""Imports one module of the program in another form than its file has; the path is the file's.

In a directory of its own it is also the `sitecustomize` of processes that a test starts: see `running`.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any


class _Loader(SourceFileLoader):
    """Compiles another text, and leaves no cache of it."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._text = source

    def get_code(self, fullname: str) -> CodeType:
        del fullname
        return compile(self._text, self.path, "exec", dont_inherit=True)


class Hook(MetaPathFinder):
    """Finds the one module."""

    def __init__(self, root: str, file: str, source: bytes) -> None:
        parts = Path(file).with_suffix("").parts
        top = next(i for i, part in enumerate(parts) if part in ("kvstore", "kvstored", "kvstored_client"))
        self.package = parts[-1] == "__init__"
        self.name = ".".join(parts[top:-1] if self.package else parts[top:])
        self._path = Path(root) / file
        self._source = source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if fullname != self.name:
            return None
        places = [str(self._path.parent)] if self.package else None
        return spec_from_file_location(
            fullname,
            self._path,
            loader=_Loader(fullname, str(self._path), self._source),
            submodule_search_locations=places,
        )

    def install(self) -> None:
        """Before the module is imported."""
        assert self.name not in sys.modules, f"{self.name} is imported already"
        sys.meta_path.insert(0, self)
