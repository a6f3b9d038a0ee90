"""
Can a test see what a call makes of its arguments?

By the test's source alone, and on the safe side: "yes" where one would have to know more. A value that is a number or
a text cannot change. Any other can be seen if a name that may stand for it, or for something that it is a part of, is
used after the call.
"""

import ast
from collections.abc import Iterator, Sequence


# What gives a value that shares nothing with its arguments.
COPIES = {
    *("abs", "bool", "chr", "complex", "float", "int", "len", "max", "min", "ord", "pow", "range", "repr", "round"),
    *("str", "sum", "copy.deepcopy", "deepcopy"),
}
RANDOM_NUMBERS = {"randint", "randrange", "random", "uniform", "gauss", "getrandbits"}
PLAIN_VALUES = RANDOM_NUMBERS | {"abs", "bool", "chr", "float", "int", "len", "ord", "repr", "round", "str"}


class Mutations:
    """
    What can be seen in a test.

    Args:
        functions: the functions that the test defines.
        callees: names of the function that it tests, whose value shares nothing with its arguments.
    """

    def __init__(self, test: ast.Module, functions: dict[str, ast.FunctionDef], callees: set[str]):
        self.functions, self.copies = functions, COPIES | callees
        self.nodes = list(ast.walk(test))  # from the outside to the inside
        self.links = [link for node in self.nodes for link in self._links(node)]

    def seen(self, call: ast.Call) -> str | None:
        """A name by which a change of the call's arguments may be seen, None without one."""
        here, scope = set(ast.walk(call)), self._scope(call)
        names = {name for argument in _arguments(call) for name in shared_names(argument, self.copies)}
        for name in sorted(self._aliases(names)):
            for use in self.nodes:
                if isinstance(use, ast.Name) and use.id == name and isinstance(use.ctx, ast.Load) and use not in here:
                    before = _position(use) < _position(call) and self._scope(use) is scope
                    if not (before and self._is_new_in_each_round(name, call, use)):
                        return name
        return None

    def _is_new_in_each_round(self, name: str, call: ast.Call, use: ast.Name) -> bool:
        """In a loop a use before the call comes after it as well, unless the name is given a value in between."""
        loops = [body for body in map(_repeated, self.nodes) if call in body and use in body]
        if not loops:
            return True
        stored = [node for node in loops[-1] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        return any(node.id == name and _position(node) < _position(use) for node in stored)

    def _scope(self, node: ast.AST) -> ast.AST | None:
        """The innermost function around a node."""
        functions = [outer for outer in self.nodes if isinstance(outer, ast.FunctionDef | ast.Lambda)]
        around = [function for function in functions if node in set(ast.walk(function))]
        return around[-1] if around else None

    def _links(self, node: ast.AST) -> Iterator[set[str]]:
        """Names that a node makes stand for the same value, or one for a part of the other's."""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):  # `rows.append(row)`
                yield set(shared_names(node, self.copies))
            for parameter, argument in passed(node, self.functions):
                yield {parameter, *shared_names(argument, self.copies)}
        for target, value in _bindings(node):
            yield {*shared_names(value, self.copies), *_stored_names(target)}

    def _aliases(self, names: set[str]) -> set[str]:
        found: set[str] = set()
        more = {name for name in names if not self._is_plain(name)}
        while more - found:
            found |= more
            more = {name for link in self.links if link & found for name in link if not self._is_plain(name)}
        return found - self._neighbours(names, found)

    def _neighbours(self, names: set[str], aliases: set[str]) -> set[str]:
        """
        Those of the aliases that only stand beside the names in the same items: the `y` of `for x, y in cases`.

        None where the items are made of other values that have a name, which may come twice.
        """
        mine = {node for name in names for node in self._bound_in(name)}
        beside = {name for name in aliases - names if self._bound_in(name) <= mine}
        for node in self.nodes:
            for target, value in _bindings(node):
                parts = _displays(value) if node in mine else [value]
                if _stored_names(target) & aliases and any(set(shared_names(part, self.copies)) for part in parts):
                    return set()
        return beside

    def _bound_in(self, name: str) -> set[ast.AST]:
        nodes = {node for node in self.nodes for target, _ in _bindings(node) if name in _stored_names(target)}
        return nodes | {node for node in self.nodes if isinstance(node, ast.arg) and node.arg == name}

    def _is_plain(self, name: str) -> bool:
        """Is `name` only ever given numbers and texts?"""
        if any(isinstance(node, ast.arg) and node.arg == name for node in self.nodes):
            return False
        values: list[ast.expr | None] = []
        for node in self.nodes:
            for target, value in _bindings(node):
                for each in _items(value) if isinstance(node, ast.For | ast.comprehension) else [value]:
                    values += _given(target, each, name)
        return bool(values) and all(value is not None and _is_plain_value(value) for value in values)


def passed(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> list[tuple[str, ast.expr]]:
    """Parameters and arguments of a call of one of the test's own functions; nothing for other calls."""
    if not isinstance(call.func, ast.Name) or call.func.id not in functions:
        return []
    parameters = [parameter.arg for parameter in functions[call.func.id].args.args]
    by_name = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None]
    return [*zip(parameters, call.args, strict=False), *by_name]


def shared_names(value: ast.AST, copies: set[str]) -> Iterator[str]:
    """Names in an expression that its value may share something with; calls of `copies` give a new one."""
    if _is_call_of(value, copies):
        return
    if isinstance(value, ast.Name) and isinstance(value.ctx, ast.Load):
        yield value.id
    for child in ast.iter_child_nodes(value):
        if not (isinstance(value, ast.Call) and child is value.func and isinstance(child, ast.Name)):
            yield from shared_names(child, copies)


def _stored_names(target: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}


def _displays(value: ast.expr) -> list[ast.expr]:
    return [node for node in ast.walk(value) if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)]


def _arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def _bindings(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values of an assignment; of a loop, its variable and what it goes through."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        return [(node.target, node.value)]
    if isinstance(node, ast.For | ast.comprehension):
        return [(node.target, node.iter)]
    return []


def _repeated(node: ast.AST) -> set[ast.AST]:
    """What a loop does again and again; nothing where the node is no loop."""
    again: Sequence[ast.AST] = []
    if isinstance(node, ast.For):
        again = [node.target, *node.body]
    elif isinstance(node, ast.While):
        again = [node.test, *node.body]
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        again = [node]
    return {inner for part in again for inner in ast.walk(part)}


def _items(iterable: ast.expr) -> list[ast.expr | None]:
    """What a loop gives its variable, as far as it is written down."""
    if _is_call_of(iterable, {"range"}):
        return [ast.Constant(0)]
    return [*iterable.elts] if isinstance(iterable, ast.List | ast.Tuple) else [None]


def _given(target: ast.expr, value: ast.expr | None, name: str) -> list[ast.expr | None]:
    """What an assignment gives `name`: expressions, None for one that is not known."""
    if isinstance(target, ast.Name):
        return [value] if target.id == name else []
    if isinstance(target, ast.Tuple | ast.List):
        values: Sequence[ast.expr | None] = [None] * len(target.elts)
        if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            values = value.elts
        return [found for part, its in zip(target.elts, values, strict=True) for found in _given(part, its, name)]
    return [None] if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(target)) else []


def _is_plain_value(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant | ast.JoinedStr | ast.Compare):
        return True
    if isinstance(value, ast.UnaryOp):
        return _is_plain_value(value.operand)
    if isinstance(value, ast.BinOp):
        return _is_plain_value(value.left) and _is_plain_value(value.right)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr in RANDOM_NUMBERS or (value.func.attr == "join" and _is_plain_value(value.func.value))
    return _is_call_of(value, PLAIN_VALUES)


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in names


def _position(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset
