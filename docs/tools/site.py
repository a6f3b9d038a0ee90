"""What `mkdocs build` does beyond mkdocs.yml: the same pages serve GitHub and the site.

- A link that leaves docs/, such as `../recipes/x.yaml`, leads to a copy of that file which is a page of the site; so
  does one to a file that is no page, such as `examples/engine_server.py`, and one to a folder. The navigation may name
  such files too, by their path in the repository.
- Formulas (```` ```math ````) become MathML, which browsers draw themselves.
"""

import ast
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
FOLDER = "source"  # where the copies stand in the site
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)([^)]*\))")
SHOWN = {".md", ".png", ".svg"}  # what the site shows as it is, if it stands in docs/
WIDE = {"metrics.md", "recipes.md", "settings.md", "trl_options.md"}  # whose tables take the place of the contents

_origin: dict[str, str] = {}  # page of the site -> its file, from the root of the repository
_named: list[str] = []  # files that the navigation names


def on_config(config):
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _formula}]
    _named.clear()
    config.nav = _outside_too(config.nav)
    return config


def _outside_too(nav):
    """The navigation with the place in the site of pages that are not in docs/."""
    if isinstance(nav, list):
        return [_outside_too(entry) for entry in nav]
    if isinstance(nav, dict):
        return {title: _outside_too(entry) for title, entry in nav.items()}
    if (ROOT / "docs" / nav).exists() or not (ROOT / nav).exists():
        return nav
    _named.append(nav)
    return _page(nav)


def on_files(files: Files, config) -> Files:
    _origin.clear()
    waiting = [file.src_uri for file in files.documentation_pages()]
    _origin.update({uri: f"docs/{uri}" for uri in waiting})
    targets = list(_named)
    while waiting or targets:
        for target in targets:
            uri = _page(target)
            if uri.startswith(f"{FOLDER}/") and uri not in _origin:
                _origin[uri] = target
                files.append(File.generated(config, uri, content=_copy(target)))
                waiting.append(uri)
        targets = _targets(waiting.pop()) if waiting else []
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    here = page.file.src_uri
    if here in WIDE:
        page.meta["hide"] = ["toc"]

    def lead(link: re.Match) -> str:
        uri = _page(_resolve(here, link[2]))
        return link[1] + posixpath.relpath(uri, posixpath.dirname(here) or ".") + link[3]

    return "".join(part if fenced else LINK.sub(lead, part) for part, fenced in _parts(markdown))


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """The page in pieces, and whether each is a fenced block."""
    pieces = re.split(r"(^(`{3,}).*?^\2`*$)", markdown, flags=re.M | re.S)
    return [(piece, number % 3 == 1) for number, piece in enumerate(pieces) if number % 3 != 2]


def _resolve(page: str, link: str) -> str:
    """The file or folder that a link of a page names, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origin[page]), link))


def _targets(page: str) -> list[str]:
    origin = ROOT / _origin[page]
    if origin.suffix != ".md":
        return [f"{_origin[page]}/{path.name}" for path in _inside(origin)] if origin.is_dir() else []
    text = "".join(part for part, fenced in _parts(origin.read_text()) if not fenced)
    return [target for _, link, _ in LINK.findall(text) if (ROOT / (target := _resolve(page, link))).exists()]


def _page(target: str) -> str:
    """Where a file of the repository stands in the site."""
    path = ROOT / target
    if target.startswith("docs/") and path.suffix in SHOWN:
        return target.removeprefix("docs/")
    if path.is_dir():
        return posixpath.join(FOLDER, target, "index.md")
    return f"{FOLDER}/{target}" if path.suffix in SHOWN else f"{FOLDER}/{target}.md"


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".py", ".yaml"))


def _copy(target: str) -> str | bytes:
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix in SHOWN:
        return path.read_bytes()
    head = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {target}\n\n"
    if path.is_dir():
        name = path.name
        lines = [f"- [{file.name}]({name}/{file.name}): {_first_line(file)}" for file in _inside(path)]
        return head + "\n".join(lines)
    language = {".py": "python", ".yaml": "yaml", ".json": "json"}.get(path.suffix, "text")
    return f"{head}``````{language}\n{path.read_text().rstrip()}\n``````\n"


def _first_line(path: Path) -> str:
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return path.read_text().partition("\n")[0].lstrip("# ")


def _formula(source: str, language: str, css_class: str, options: dict, md, **kwargs) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'
