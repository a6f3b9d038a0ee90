"""
The first lines of a fresh interpreter in a sandbox, run as `python -c`.

They read modules of this package and their arguments from descriptor 4 (no file of this package need be readable in
there), and start the last module.
"""

import marshal
import sys
import types


def boot_in_sandbox() -> None:
    with open(4, "rb") as file:
        modules, arguments = marshal.load(file)
    package = types.ModuleType("inside")
    package.__path__ = []
    sys.modules["inside"] = package
    for name, source in modules:
        module = types.ModuleType(f"inside.{name}")
        module.__package__ = "inside"
        sys.modules[module.__name__] = module
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    module.start(*arguments)


if __name__ == "__main__":
    boot_in_sandbox()
