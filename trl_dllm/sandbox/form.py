"""
Can a test be judged outside the program's process?

It can where the program is one function of values: `assert f(args) == value` and all that is computed from such calls,
with loops, helper functions and random arguments. Values go into the program's process and come back; what the test
asks besides is lost on that way. So a test is judged inside, as one program with what it tests, if it

- uses more names of the program than the one function, or that one as something else than a function to call;
- passes functions, classes or generators as arguments;
- may look at an argument after the call, to see what the program made of it, or compares by identity;
- calls without using the value, or looks at what was printed, at files, at time, at anything but values;
- uses attributes of values that are no attributes of data, or types that are not data (a date, a deque).

The rules look at the test's source alone, which is trusted, and refuse what they do not know: a test that is sent
inside by mistake is judged as well as it was before, and counted.
"""

import ast
import builtins
import functools
from typing import NamedTuple

from .mutation import RANDOM_NUMBERS, Mutations, passed


# Modules that give data for data. Others have types of their own, such as a date or a deque, which would not arrive.
MODULES = {"bisect", "cmath", "copy", "heapq", "json", "math", "random", "statistics", "string", "typing"}
FORBIDDEN_NAMES = {
    *("Ellipsis", "NotImplemented", "__import__", "breakpoint", "callable", "classmethod", "compile", "delattr"),
    *("dir", "eval", "exec", "exit", "getattr", "globals", "hasattr", "help", "id", "input", "locals", "memoryview"),
    *("object", "open", "property", "quit", "setattr", "slice", "staticmethod", "super", "type", "vars"),
}
FORBIDDEN_NODES: tuple[type[ast.AST], ...] = (
    *(ast.AsyncFor, ast.AsyncFunctionDef, ast.AsyncWith, ast.Await, ast.ClassDef, ast.Delete, ast.Global),
    *(ast.Match, ast.Nonlocal, ast.Try, getattr(ast, "TryStar", ast.Try), ast.With, ast.Yield, ast.YieldFrom),
)
DATA_TYPES = (int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range)
ATTRIBUTES = RANDOM_NUMBERS | {name for kind in DATA_TYPES for name in dir(kind) if not name.startswith("_")}


class Form(NamedTuple):
    """How a test can be judged: outside, by calls of `entry_point`; or inside, because of `problem`."""

    entry_point: str | None
    problem: str | None = None


class _Inside(Exception):
    pass


@functools.lru_cache(maxsize=4096)
def form_of(setup: str, test: str, entry_point: str | None = None) -> Form:
    """
    The form of a test with what it needs before it. Never raises.

    Args:
        entry_point: the function that is tested; None for the one name that is used and not defined.
    """
    try:
        return Form(_Reading(ast.parse(setup), ast.parse(test), entry_point).entry_point)
    except _Inside as problem:
        return Form(None, str(problem))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Form(None, "it is not Python")


class _Reading:
    """Raises `_Inside` on the first thing in a test that needs the program's own process."""

    def __init__(self, setup: ast.Module, test: ast.Module, entry_point: str | None):
        self.setup, self.test = setup, test
        self.modules: set[str] = set()
        self.functions: dict[str, ast.FunctionDef] = {}
        self.variables: set[str] = set()
        for node in (*ast.walk(setup), *ast.walk(test)):
            self._collect(node)
        self.entry_point = entry_point or self._find_entry_point()
        self._check_names()
        self.callees = self._names_of_the_function()
        self.mutations = Mutations(test, self.functions, self.callees)
        for node in ast.walk(test):
            self._check_node(node)

    # Names

    def _collect(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            for module in names if isinstance(node, ast.Import) else [node.module or "a file beside it"]:
                if module.split(".")[0] not in MODULES:
                    raise _Inside(f"it imports {module}")
            if "*" in names:
                raise _Inside("it imports *")
            self.modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            self.functions[node.name] = node
        elif isinstance(node, ast.arg):
            self.variables.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            self.variables.add(node.id)

    def _find_entry_point(self) -> str:
        known = {*self.modules, *self.functions, *self.variables, *dir(builtins)}
        free = sorted((_names(self.setup) | _names(self.test)) - known)
        if len(free) == 1:
            return free[0]
        if not free and len(self.test.body) == 1:  # it may have the name of a built-in one: `assert sum(1, 2) == 3`
            statement = self.test.body[0]
            if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
                call = statement.test.left
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    return call.func.id
        raise _Inside(f"it uses {len(free)} names of the program: {', '.join(free) or 'none'}")

    def _check_names(self) -> None:
        known = {self.entry_point, *self.modules, *self.functions, *self.variables, *dir(builtins)}
        for name in sorted(_names(self.setup) | _names(self.test)):
            if name not in known:
                raise _Inside(f"it uses {name} of the program")
            if name in FORBIDDEN_NAMES and name != self.entry_point:
                raise _Inside(f"it uses {name}")
        in_test = {node.name for node in ast.walk(self.test) if isinstance(node, ast.FunctionDef)}
        if self.entry_point in self.variables | self.modules | in_test:
            raise _Inside(f"it gives {self.entry_point} a meaning of its own")
        if self.entry_point in _names(self.setup):
            raise _Inside(f"it needs {self.entry_point} before the test")

    def _names_of_the_function(self) -> set[str]:
        """The entry point, and parameters of the test's own functions that it is passed as."""
        names: set[str] = set()
        found = {self.entry_point}
        while found - names:
            names |= found
            allowed = set()
            for node in ast.walk(self.test):
                if isinstance(node, ast.Call):
                    allowed.add(node.func)
                    for parameter, argument in passed(node, self.functions):
                        if isinstance(argument, ast.Name) and argument.id in names:
                            allowed.add(argument)
                            found.add(parameter)
            for node in ast.walk(self.test):
                if isinstance(node, ast.Name) and node.id in names and node not in allowed:
                    raise _Inside(f"it uses {node.id} as something else than a function to call")
        return names

    # Statements and expressions

    def _is_candidate(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.callees

    def _check_node(self, node: ast.AST) -> None:
        if isinstance(node, FORBIDDEN_NODES):
            raise _Inside(f"it has a statement or expression {type(node).__name__}")
        if isinstance(node, ast.Expr) and self._is_candidate(node.value):
            raise _Inside("it calls the program without using the value")
        if isinstance(node, ast.Attribute):
            of_module = isinstance(node.value, ast.Name) and node.value.id in self.modules
            if node.attr.startswith("_") or not (of_module or node.attr in ATTRIBUTES):
                raise _Inside(f"it uses the attribute {node.attr}")
        if isinstance(node, ast.Compare) and any(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            sides = [side.value for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
            if not any(value is None or isinstance(value, bool) for value in sides):
                raise _Inside("it compares by identity")
        if isinstance(node, ast.Call) and self._is_candidate(node):
            self._check_call(node)

    def _check_call(self, call: ast.Call) -> None:
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            if any(isinstance(node, ast.Lambda | ast.GeneratorExp) for node in ast.walk(argument)):
                raise _Inside("it passes a function or a generator")
            for name in _names_as_values(argument) - self.variables:
                raise _Inside(f"it passes {name}, which is no value")
        seen = self.mutations.seen(call)
        if seen is not None:
            raise _Inside(f"it may look at {seen} after the program had it")


def _names(tree: ast.AST) -> set[str]:
    """Names that are used."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _names_as_values(argument: ast.expr) -> set[str]:
    """Names in an argument that are not called, nor the module of an attribute."""
    heads = {node.func for node in ast.walk(argument) if isinstance(node, ast.Call)}
    heads |= {node.value for node in ast.walk(argument) if isinstance(node, ast.Attribute)}
    nodes = [node for node in ast.walk(argument) if isinstance(node, ast.Name) and node not in heads]
    return {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
