"""The source of each module of this package: what runs in a sandbox may not be able to read the files."""

import os


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


_FOLDER = os.path.dirname(__file__)
SOURCES = {name[:-3]: _read(os.path.join(_FOLDER, name)) for name in os.listdir(_FOLDER) if name.endswith(".py")}
