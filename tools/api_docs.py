"""Write docs/api.md from the docstrings: `python tools/api_docs.py > docs/api.md`. Reads the sources, imports none."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# API

Made from the docstrings by `make docs`; a test holds it to them. Sizes (`..._nbytes`) are bytes, times (`..._s`)
seconds, shares (`..._fraction`) 0 to 1. A tensor is a torch tensor or a numpy array. `None`, `False` and 0 are a miss;
what raises is said with each verb, and [below](#errors). For the sense of the whole begin with
[the tutorial](tutorial.md). `kvstored_client.aio.Client` has the verbs of `Client`, to be awaited
([how](faq.md#my-server-is-asyncio)).
"""
SECTIONS: dict[str, tuple[str, ...]] = {
    "A worker's client": ("client/kvstored_client/client.py:Client",),
    "The embedded store": ("kvstore/store.py:Store",),
    "Prefixes": ("kvstore/prefix.py:Namespace", "kvstore/keys.py:Identity", "kvstore/keys.py:chunk_keys"),
    "What calls return": (
        "kvstore/hit.py:Hit", "kvstore/hit.py:Match", "kvstore/hit.py:Held", "kvstore/hit.py:EntryInfo",
        "kvstore/dtypes.py:TensorSpec", "kvstore/hit.py:Explanation", "kvstore/hit.py:Verified",
        "kvstore/hit.py:Copied", "kvstore/packed.py:PackedTensor",
        "kvstore/stats.py:Stats", "kvstore/stats.py:TierStats", "kvstore/stats.py:Setting",
    ),
    "What calls take": ("kvstore/lookup.py:Lookup", "kvstore/options.py:PutOptions"),
    "Configuration of an embedded store": (
        "kvstore/config.py:StoreConfig", "kvstore/config.py:HotConfig", "kvstore/config.py:WarmConfig",
        "kvstore/config.py:ColdConfig", "kvstore/config.py:SharedConfig",
    ),
    "Integrations": (
        "client/kvstored_client/integrations/transformers/__init__.py:PrefixCache",
        "client/kvstored_client/integrations/transformers/__init__.py:Usage",
        "client/kvstored_client/integrations/simple.py:SimpleKVCache",
        "client/kvstored_client/integrations/simple.py:QuantizedKVCache",
        "client/kvstored_client/integrations/simple.py:HybridKVCache",
        "client/kvstored_client/integrations/guard.py:Guard",
    ),
    "Encoded entries": ("kvstore/codecs/packing.py:encode", "kvstore/codecs/packing.py:decode"),
    "Extensions": ("kvstore/codecs/outside.py:register_codec", "kvstore/policies/__init__.py:register_policy"),
}  # fmt: skip
"""FILE:NAME of what is public, in the order of the page. The errors follow, all of their module."""
_SIMPLE = "client/kvstored_client/integrations/simple.py"
BASES = {
    "Store": (
        "kvstore/residency/disk_verbs.py:DiskVerbs", "kvstore/residency/budget_verbs.py:BudgetVerbs",
        "kvstore/residency/shared_verbs.py:SharedVerbs",
    ),
    "Client": ("client/kvstored_client/asking.py:Asking",),
    **dict.fromkeys(("SimpleKVCache", "QuantizedKVCache", "HybridKVCache"), (f"{_SIMPLE}:_KVCache",)),
}  # fmt: skip
"""Where verbs of a class stand that its own file does not have."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """Something public in the sources: FILE:NAME."""

    file: str
    name: str

    @classmethod
    def of(cls, text: str) -> "Place":
        """From its text."""
        return cls(*text.split(":"))

    @property
    def module(self) -> str:
        """As it is imported: from the package itself, where that offers it."""
        for package, file in (("kvstore", "kvstore"), ("kvstored_client", "client/kvstored_client")):
            if self.file.startswith(f"{file}/") and f'"{self.name}"' in (ROOT / file / "__init__.py").read_text():
                return package
        path = self.file.removeprefix("client/").removesuffix(".py").removesuffix("/__init__")
        return path.replace("/", ".")

    def node(self) -> ast.ClassDef | Function:
        """Its definition. Raises LookupError where there is none."""
        tree = ast.parse((ROOT / self.file).read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef | Function) and node.name == self.name:
                return node
        raise LookupError(f"{self.file} has no {self.name}: mend tools/api_docs.py")


def _text(node: ast.expr | ast.AnnAssign) -> str:
    """An expression as the formatter writes it, which looks into Markdown, too: with double quotes."""
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', ast.unparse(node))


def doc(node: ast.ClassDef | Function) -> str:
    """A docstring as Markdown: prose is prose, and what is indented stays a block."""
    text = ast.get_docstring(node, clean=True) or ""
    return cleandoc(text).replace("<", "&lt;")


def signature(node: Function, name: str) -> str:
    """NAME(arguments) -> result, with a line for each argument where one line is too long."""
    result = f" -> {_text(node.returns)}" if node.returns is not None else ""
    short = f"{name}({_arguments(node)}){result}"
    if len(short) <= 110:
        return short
    whole = _arguments(node, "\n    ")
    return f"{name}(\n    {whole},\n){result}"


def _arguments(node: Function, apart: str = " ") -> str:
    of = node.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    positional = [*of.posonlyargs, *of.args]
    defaults = [None] * (len(positional) - len(of.defaults)) + list(of.defaults)
    parts = [_one(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls") and not static:
        parts = parts[1:]
    if of.vararg is not None:
        parts.append(f"*{_one(of.vararg, None)}")
    elif of.kwonlyargs:
        parts.append("*")
    parts += [_one(arg, default) for arg, default in zip(of.kwonlyargs, of.kw_defaults, strict=True)]
    if of.kwarg is not None:
        parts.append(f"**{_one(of.kwarg, None)}")
    return f",{apart}".join(parts)


def _one(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_text(arg.annotation)}" if arg.annotation is not None else ""
    value = "" if default is None else f" = {_text(default)}"
    return f"{arg.arg}{kind}{value}"


def members(place: Place) -> Iterator[Function]:
    """The public verbs and properties of a class, in the order of the sources; its bases' own behind them."""
    seen: set[str] = set()
    for each in (place, *map(Place.of, BASES.get(place.name, ()))):
        node = each.node()
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, Function) and not inner.name.startswith("_") and inner.name not in seen:
                if any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in inner.decorator_list):
                    continue
                seen.add(inner.name)
                yield inner


def fields(node: ast.ClassDef) -> list[str]:
    """The fields of a dataclass or named tuple, each a line of Python."""
    return [
        _text(inner)
        for inner in node.body
        if isinstance(inner, ast.AnnAssign)
        and isinstance(inner.target, ast.Name)
        and not inner.target.id.startswith("_")
    ]


def described(place: Place) -> Iterator[str]:
    """The paragraphs about one class or function."""
    node = place.node()
    yield f"### {place.name}"
    yield f"`from {place.module} import {place.name}`"
    if not isinstance(node, ast.ClassDef):
        yield f"```python\n{signature(node, place.name)}\n```"
        yield doc(node)
        return
    made = next((inner for inner in node.body if isinstance(inner, Function) and inner.name == "__init__"), None)
    if made is not None and place.name not in ("Store", "Namespace"):  # those two are made by a verb
        yield f"```python\n{signature(made, place.name)}\n```"
    yield doc(node)
    held = fields(node)
    if held:
        yield "```python\n" + "\n".join(held) + "\n```"
    for inner in members(place):
        names = {d.id for d in inner.decorator_list if isinstance(d, ast.Name)}
        yield f"#### {place.name}.{inner.name}"
        if "property" in names:
            kind = _text(inner.returns) if inner.returns is not None else "object"
            yield f"```python\n{inner.name}: {kind}\n```"
        else:
            yield f"```python\n{signature(inner, inner.name)}\n```"
        yield doc(inner)


def errors() -> Iterator[str]:
    """All errors, with whose they are."""
    tree = ast.parse((ROOT / "kvstore/errors.py").read_text())
    yield "## Errors"
    yield "`from kvstore import NAME`, or from `kvstored_client.errors`. By what the caller can do:"
    block = (ast.get_docstring(tree) or "").split("\n\n")[1]
    yield "```text\n" + "\n".join(line[4:] for line in block.splitlines()) + "\n```"
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield f"### {node.name}"
            yield doc(node)


def page() -> str:
    """The whole page."""
    parts = [HEAD.strip()]
    for title, places in SECTIONS.items():
        parts.append(f"## {title}")
        for text in places:
            parts += described(Place.of(text))
    parts += errors()
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
