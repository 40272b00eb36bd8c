# SPDX-License-Identifier: GPL-3.0-or-later
"""Finds the functions of a program that compare addresses, logins or host names.

It looks for names, and would rather find too much: whatever has to do with an address, and is compared, searched, cut,
used as a key, or asked whether it is empty.
"""

import ast
import re
from collections.abc import Iterator

_NAMES = {"sender", "recipient", "recipients", "hostname", "helo", "login", "mailfrom", "rcpt", "mailbox"}
_STAGES = {"on_connect", "on_helo", "on_mail", "on_rcpt"}
_OTHER_ARGUMENTS = {"ctx", "params", "address"}
_MACRO = re.compile(r"\{?(auth|client|mail|rcpt)_(addr|authen|author|host|name|ptr|resolve)\}?")
_PARTS = {"canonical", "domain", "local", "matches"}
_OF_TEXT = {
    *(
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "lower",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
    ),
    *("rfind", "rindex", "rpartition", "rsplit", "split", "startswith", "strip", "upper", "discard", "remove"),
}
_BY_KEY = {"get", "pop", "setdefault", "match", "fullmatch", "search", "findall", "fnmatch", "fnmatchcase", "execute"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def comparing(source: str) -> list[str]:
    """The names of its functions that do so, in order; the module itself is ``""``."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    found = [node.name for node in functions if _compares(node)]
    return ["", *found] if _compares(tree) else found


def _compares(function: ast.AST) -> bool:
    nodes = list(_own_nodes(function))
    known = _NAMES | _arguments(function)
    size = -1
    while size != len(known):  # until no assignment adds a name
        size = len(known)
        known |= {name for node in nodes for name in _named(node, known)}
    return any(_suspicious(node, known) for node in nodes)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """All that is in it, but not in a function within it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, Function):
            yield child
            yield from _own_nodes(child)


def _arguments(function: ast.AST) -> set[str]:
    """Those of a handler that are addresses or names of hosts, whatever they are called."""
    if not isinstance(function, Function):
        return set()
    nodes = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
    stages = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & _STAGES
    return {argument.arg for argument in function.args.args} - _OTHER_ARGUMENTS if stages else set()


def _named(node: ast.AST, known: set[str]) -> Iterator[str]:
    """The names that get their value from something of the kind."""
    match node:
        case ast.Assign(targets=targets, value=value) if _concerns(value, known):
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if _concerns(value, known):
            yield name
        case ast.NamedExpr(target=ast.Name(id=name), value=value) if _concerns(value, known):
            yield name
        case (
            ast.For(target=ast.Name(id=name), iter=value) | ast.comprehension(target=ast.Name(id=name), iter=value)
        ) if _concerns(value, known):
            yield name


def _concerns(node: ast.AST, known: set[str]) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
        return False
    return _is(node, known) or any(_concerns(child, known) for child in ast.iter_child_nodes(node))


def _is(node: ast.AST, known: set[str]) -> bool:
    match node:
        case ast.Name(id=name):
            return name in known
        case ast.Attribute(attr=name):
            return name in _NAMES
        case ast.Constant(value=str(text)):
            return _MACRO.fullmatch(text) is not None
    return False


def _suspicious(node: ast.AST, known: set[str]) -> bool:
    match node:
        case ast.Compare(ops=operators):
            by_identity = all(isinstance(operator, ast.Is | ast.IsNot) for operator in operators)
            return not by_identity and _concerns(node, known)
        case ast.Attribute(value=value, attr=name) if name in _PARTS | _OF_TEXT:
            return _concerns(value, known)
        case ast.Call(func=ast.Attribute(attr=name), args=arguments) if name in _BY_KEY:
            # A macro is itself the key of a look-up that compares nothing.
            return any(_concerns(each, known) for each in arguments if not isinstance(each, ast.Constant))
        case ast.Subscript(slice=key):
            return not isinstance(key, ast.Constant) and _concerns(key, known)
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            return _asked(test, known)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _asked(operand, known)
        case ast.BoolOp(values=values):
            return any(_asked(value, known) for value in values)
        case ast.comprehension(ifs=tests):
            return any(_asked(test, known) for test in tests)
    return False


def _asked(test: ast.AST, known: set[str]) -> bool:
    """Whether it is asked if this is empty: the null sender, or a client without a login."""
    if isinstance(test, ast.Call):
        return any(_is(each, known) for each in test.args)
    return _is(test, known)
