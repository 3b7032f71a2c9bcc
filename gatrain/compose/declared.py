"""Which arguments of a ``_target_`` are text, by its own signature, read from the source without importing it.

A command line and a YAML file give ``2026_01_31`` as a number and ``7e91234`` as infinity. Where the function says
``str`` or ``Path``, it is a name and stays as it was written.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TEXT = {"str", "Path", "PathLike", "PurePath", "PosixPath", "StrPath"}
_LISTS = {"list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Collection", "set", "Set"}
_NOTHING = {"None", "NoneType", "Ellipsis"}
_MAX_HOPS = 12


@dataclass(frozen=True)
class Text:
    """What an argument takes, as far as text is concerned."""

    itself: bool = False
    """Text and no number."""
    items: bool = False
    """A list of text."""
    nothing: bool = False
    """None too."""
    known: bool = True
    """False where neither annotation nor default says anything."""


def text_arguments(target: str, cwd: Path) -> dict[str, Text]:
    """Arguments of ``target`` whose annotation or default says what they take; empty where nothing is found out."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, ImportError, AttributeError):
        return _Search(cwd).arguments(target)
    return {}


class _Search:
    def __init__(self, cwd: Path) -> None:
        self._path = [str(cwd), *sys.path]
        self._hops = 0

    def arguments(self, target: str) -> dict[str, Text]:
        found = self._definition(target)
        if found is None:
            return {}
        node, module = found
        if isinstance(node, ast.ClassDef):
            return self._of_class(node, module)
        return _of_function(node, skip_first=False)

    def _of_class(self, node: ast.ClassDef, module: str) -> dict[str, Text]:
        own = {each.name: each for each in _statements(node.body) if isinstance(each, ast.FunctionDef)}
        if "__init__" in own or "__new__" in own:
            return _of_function(own.get("__init__", own.get("__new__")), skip_first=True)
        arguments: dict[str, Text] = {}
        for base in node.bases:
            name = ast.unparse(base)
            found = self._definition(f"{module}.{name}") if name.replace(".", "").isidentifier() else None
            if found is not None and isinstance(found[0], ast.ClassDef):
                arguments |= self._of_class(found[0], found[1])
        for each in node.body:  # fields of a dataclass
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                arguments[each.target.id] = _text(each.annotation, each.value)
        return arguments

    def _definition(self, dotted: str) -> tuple[ast.ClassDef | ast.FunctionDef, str] | None:
        """The class or function of that name, and the module that holds it."""
        self._hops += 1
        if self._hops > _MAX_HOPS:
            return None
        located = self._module(dotted.split("."))
        if located is None:
            return None
        file, module, rest = located
        body = ast.parse(file.read_bytes()).body
        for depth, name in enumerate(rest):
            node = next((each for each in _statements(body) if _defines(each, name)), None)
            if isinstance(node, ast.ImportFrom):
                alias = next(each for each in node.names if (each.asname or each.name) == name)
                origin = _absolute(node, module, file)
                return self._definition(".".join([*origin, alias.name, *rest[depth + 1 :]]))
            if isinstance(node, ast.ClassDef) and depth + 1 < len(rest):
                body = node.body
                continue
            return (node, module) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
        return None

    def _module(self, names: list[str]) -> tuple[Path, str, list[str]] | None:
        spec = importlib.machinery.PathFinder.find_spec(names[0], self._path)
        if spec is None or not (spec.origin or "").endswith(".py"):
            return None
        file, used = Path(str(spec.origin)), 1
        for name in names[1:]:
            if file.name != "__init__.py":
                break
            inner = [file.parent / f"{name}.py", file.parent / name / "__init__.py"]
            deeper = next((path for path in inner if path.is_file()), None)
            if deeper is None:
                break
            file, used = deeper, used + 1
        return file, ".".join(names[:used]), names[used:]


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> list[str]:
    names = node.module.split(".") if node.module else []
    if not node.level:
        return names
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    return [*package[: len(package) - node.level + 1], *names]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those under ``if`` and ``try`` too; the last definition counts."""
    for node in reversed(body):
        for inner in ("orelse", "handlers", "body") if isinstance(node, ast.If | ast.Try) else ():
            for each in getattr(node, inner, ()):
                yield from _statements(each.body if isinstance(each, ast.ExceptHandler) else [each])
        yield node


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name == name
    return isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names)


def _of_function(node: ast.FunctionDef | None, skip_first: bool) -> dict[str, Text]:
    if node is None:
        return {}
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(node.args.defaults))
    pairs = [
        *zip(plain, [*defaults, *node.args.defaults], strict=True),
        *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
    ]
    is_static = any(ast.unparse(each) == "staticmethod" for each in node.decorator_list)
    is_method = bool(plain) and plain[0].arg in ("self", "cls") and not is_static
    return {
        argument.arg: _text(argument.annotation, default)
        for argument, default in (pairs[1:] if skip_first or is_method else pairs)
    }


def _text(annotation: ast.expr | None, default: ast.expr | None) -> Text:
    if annotation is None:
        value = default.value if isinstance(default, ast.Constant) else None
        return Text(itself=isinstance(value, str), known=value is not None)
    parts = list(_parts(annotation))
    named = [part for part in parts if _name(part) not in _NOTHING]
    takes = [_name(part) in _TEXT or _is_words(part) for part in named]
    lists = [_is_list_of_text(part) for part in named]
    return Text(
        itself=any(takes) and all(a or b for a, b in zip(takes, lists, strict=True)),
        items=any(lists),
        nothing=len(named) < len(parts),
    )


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """The members of a union; those of ``Optional``, ``Annotated`` and quoted annotations too."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _parts(ast.parse(node.value, mode="eval").body)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _parts(node.left)
        yield from _parts(node.right)
    elif isinstance(node, ast.Subscript) and _name(node.value) in ("Optional", "Union", "Annotated", "Final"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for each in inner[:1] if _name(node.value) == "Annotated" else inner:
            yield from _parts(each)
        if _name(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _is_words(node: ast.expr) -> bool:
    """``Literal["a", "b"]``."""
    if not (isinstance(node, ast.Subscript) and _name(node.value) == "Literal"):
        return False
    values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return all(
        isinstance(each, ast.Constant) and (each.value is None or isinstance(each.value, str))
        for each in values
    )


def _is_list_of_text(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Subscript) and _name(node.value) in _LISTS):
        return False
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return all(_text(each, None).itself or _name(each) in _NOTHING for each in inner)
