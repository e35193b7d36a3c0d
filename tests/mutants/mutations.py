"""The changes: comparisons, bounds, orders, locks, guards, arithmetic, constants, calls left out.

Each one replaces the text of one syntax node, so that every other line keeps its number. Pure: text in, text out.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "+", ast.LShift: ">>", ast.RShift: "<<",
    ast.BitOr: "&", ast.BitAnd: "|",
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "all": "any", "any": "all", "reversed": "list", "sorted": "list"}
LOCK = re.compile(r"lock|_changed|_moving|reads\b")
QUIET = re.compile(r"\b(log|logger|warnings)\.")
"""Calls that only tell somebody: to leave one out changes no value."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file. at: the bytes [start, stop) that become `after`. kind: which sort of change it is.

    outside: it is in no function, so it runs when the module is imported.
    """

    file: str
    line: int
    kind: str
    at: tuple[int, int]
    before: str
    after: str
    outside: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others, as long as the file stays as it is."""
        return f"{self.file}:{self.line} {self.kind}: {_short(self.before)} -> {_short(self.after)}"

    def applied(self, source: bytes) -> bytes:
        """The source with the change."""
        start, stop = self.at
        return source[:start] + self.after.encode() + source[stop:]


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:70]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Every change of a source file that still compiles, in the order of the file."""
    tree = ast.parse(source)
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
    maker = _Maker(file, source, inside)
    functions = [maker.lines_of(at) for at in _outermost(tree)]
    found: dict[tuple[tuple[int, int], str], Mutant] = {}
    for node in _program(tree):
        for mutant in maker.of(node):
            if mutant.before != mutant.after and _compiles(mutant, source, functions):
                found.setdefault((mutant.at, mutant.after), mutant)
    return sorted(found.values(), key=lambda m: (m.at, m.after))


def _outermost(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _outermost(node)


def _compiles(mutant: Mutant, source: bytes, functions: list[tuple[int, int]]) -> bool:
    """Whether it is still Python. Only the function around it is parsed: a file has hundreds of changes."""
    start, stop = mutant.at
    text = mutant.applied(source)
    for first, last in functions:
        if first <= start and stop <= last:
            function = text[first : last + len(text) - len(source)]
            text = b"if 1:\n" + function if function[:1].isspace() else function
            break
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _program(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes whose value matters when the program runs: no docstrings, annotations, assertions, Protocols, messages."""
    for node in ast.iter_child_nodes(tree):
        if _says_nothing(node):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            _strip(node)
        if not isinstance(node, ast.AnnAssign):
            yield node
            yield from _program(node)
        elif node.value is not None:
            yield node.value
            yield from _program(node.value)


def _says_nothing(node: ast.AST) -> bool:
    if isinstance(node, ast.ClassDef):
        return any(getattr(base, "id", "") == "Protocol" for base in node.bases)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and QUIET.match(ast.unparse(node.value)) is not None
    return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Global)


def _strip(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
    """Without decorators, annotations, and attributes set in `__init__`: one that is never set fails at once."""
    node.decorator_list = []
    if isinstance(node, ast.ClassDef):
        return
    if node.name == "__init__":
        node.body = [at for at in node.body if not isinstance(at, ast.Assign)]
    node.returns = None
    for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        arg.annotation = None


class _Maker:
    """Makes the mutants of one node after the other."""

    def __init__(self, file: str, source: bytes, inside: set[int]) -> None:
        self._file = file
        self._inside = inside
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def lines_of(self, node: ast.stmt) -> tuple[int, int]:
        """The bytes of a statement's whole lines."""
        return self._starts[node.lineno - 1], self._span(node)[1]

    def of(self, node: ast.AST) -> Iterator[Mutant]:
        """Every change of this node, its children's left out."""
        make = getattr(self, f"_{type(node).__name__.lower()}", None)
        if make is not None:
            yield from make(node)

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self._source[start:stop].decode()

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _made(self, node: ast.AST, kind: str, after: str) -> Mutant:
        start, stop = self._span(node)
        return self._between(node, kind, start, stop, after)

    def _between(self, node: ast.AST, kind: str, start: int, stop: int, after: str) -> Mutant:
        line: int = node.lineno  # type: ignore[attr-defined]
        before = self._source[start:stop].decode()
        return Mutant(self._file, line, kind, (start, stop), before, after, line not in self._inside)

    def _compare(self, node: ast.Compare) -> Iterator[Mutant]:
        left: ast.expr = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            start, stop = self._span(left)[1], self._span(right)[0]
            between = self._source[start:stop].decode()
            # Brackets that close before the operator, or open after it, belong to the operands.
            head, tail = between[: len(between) - len(between.lstrip(") \n"))], between[len(between.rstrip("( \n")) :]
            for after in COMPARISONS.get(type(operator), ()):
                yield self._between(right, "comparison", start, stop, f"{head.rstrip() or ''} {after} {tail.lstrip()}")
            left = right

    def _boolop(self, node: ast.BoolOp) -> Iterator[Mutant]:
        word = " or " if isinstance(node.op, ast.And) else " and "
        texts = [f"({self._text(value)})" for value in node.values]
        yield self._made(node, "and/or", f"({word.join(texts)})")
        own = " and " if isinstance(node.op, ast.And) else " or "
        for i in range(len(texts)):
            left_out = own.join(text for at, text in enumerate(texts) if at != i)
            yield self._made(node, "condition left out", f"({left_out})")

    def _unaryop(self, node: ast.UnaryOp) -> Iterator[Mutant]:
        if isinstance(node.op, ast.Not | ast.USub):
            yield self._made(node, "sign", f"({self._text(node.operand)})")

    def _binop(self, node: ast.BinOp) -> Iterator[Mutant]:
        after = ARITHMETIC.get(type(node.op))
        left = node.left
        text = isinstance(left, ast.JoinedStr) or (isinstance(left, ast.Constant) and isinstance(left.value, str))
        if after is not None and not text:
            yield self._made(node, "arithmetic", f"(({self._text(node.left)}) {after} ({self._text(node.right)}))")

    def _augassign(self, node: ast.AugAssign) -> Iterator[Mutant]:
        yield self._made(node, "left out", "pass")
        if isinstance(node.op, ast.Add | ast.Sub):
            after = "-=" if isinstance(node.op, ast.Add) else "+="
            yield self._made(node, "arithmetic", f"{self._text(node.target)} {after} {self._text(node.value)}")

    def _assign(self, node: ast.Assign) -> Iterator[Mutant]:
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            yield self._made(node, "left out", "pass")

    def _delete(self, node: ast.Delete) -> Iterator[Mutant]:
        yield self._made(node, "left out", "pass")

    def _expr(self, node: ast.Expr) -> Iterator[Mutant]:
        if isinstance(node.value, ast.Call):
            yield self._made(node, "call left out", "pass")

    def _constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self._made(node, "constant", str(not node.value))
        elif isinstance(node.value, int):
            yield self._made(node, "constant", str(node.value + 1))

    def _call(self, node: ast.Call) -> Iterator[Mutant]:
        if isinstance(node.func, ast.Name) and node.func.id in SWAPPED and len(node.args) == 1:
            swapped = SWAPPED[node.func.id]
            if swapped == "list":
                yield self._made(node, "order", f"list({self._text(node.args[0])})")
            else:
                yield self._made(node.func, "min/max/all/any", swapped)
        elif isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            yield self._made(node.func, "min/max/all/any", SWAPPED[node.func.id])

    def _subscript(self, node: ast.Subscript) -> Iterator[Mutant]:
        if isinstance(node.slice, ast.Slice) and isinstance(node.ctx, ast.Load) and self._text(node.slice) == "::-1":
            yield self._made(node, "order", self._text(node.value))

    def _if(self, node: ast.If) -> Iterator[Mutant]:
        yield self._made(node.test, "guard left out", "False")
        yield self._made(node.test, "guard always", "True")

    def _ifexp(self, node: ast.IfExp) -> Iterator[Mutant]:
        yield self._made(node, "choice", f"({self._text(node.body)})")
        yield self._made(node, "choice", f"({self._text(node.orelse)})")

    def _while(self, node: ast.While) -> Iterator[Mutant]:
        if self._text(node.test) != "True":
            yield self._made(node.test, "guard left out", "False")

    def _with(self, node: ast.With) -> Iterator[Mutant]:
        item = node.items[0]
        if len(node.items) == 1 and item.optional_vars is None and LOCK.search(self._text(item.context_expr)):
            start = self._span(node)[0]
            stop = self._span(item.context_expr)[1]
            yield self._between(node, "lock left out", start, stop, "if True")

    def _break(self, node: ast.Break) -> Iterator[Mutant]:
        yield self._made(node, "jump", "continue")

    def _continue(self, node: ast.Continue) -> Iterator[Mutant]:
        yield self._made(node, "jump", "break")
