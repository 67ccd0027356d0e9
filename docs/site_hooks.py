"""Hooks of mkdocs: pages from the files at the top of the repository, and the check that the site needs no network."""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Pages of the navigation that a checkout may lack; without one its entry is left out.
OPTIONAL = {"gpu.md"}
# Code, which stays as it is, and the "][" of indices such as [row][column], which Markdown would take for a link.
INDEX = re.compile(r"(```.*?```|`[^`]*`)|\]\[", re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    config["nav"] = _present(config["nav"])
    return config


def _present(entries: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target)})
        elif target not in OPTIONAL or (ROOT / "docs" / target).is_file():
            kept.append(entry)
    return kept


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relink(text, files)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri.startswith("api/"):
        return markdown
    return INDEX.sub(lambda match: match.group(1) or r"]\[", markdown)


def _relink(text: str, files: Files) -> str:
    """Links as the site needs them: ``docs/models.md`` becomes ``models.md``; a file that is no page loses its link."""

    def replace(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or "://" in path:
            return match.group(0)
        page = PAGES.get(path, posixpath.relpath(path, "docs"))
        if page in PAGES.values() or files.get_file_from_path(page) is not None:
            return f"{mark}[{label}]({page}{hash_}{anchor})"
        return label

    return LINK.sub(replace, text)


class _Loads(HTMLParser):
    """Everything that a page makes the browser fetch; links that a reader may click are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" or (tag == "link" and values.get("rel") in ("canonical", "next", "prev", "edit")):
            return
        for name in ("src", "href", "srcset", "data", "poster"):
            value = values.get(name) or ""
            if re.match(r"(https?:)?//", value):
                self.found.append(value)


def on_post_build(config: Any) -> None:
    outside = []
    for page in Path(config["site_dir"]).rglob("*.html"):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        outside += [f"{page}: {address}" for address in loads.found]
    for sheet in Path(config["site_dir"]).rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        outside += [f"{sheet}: {address}" for address in re.findall(r"url\([\"']?((?:https?:)?//[^)]*)", text)]
    if outside:
        raise PluginError("the site would load from other servers:\n" + "\n".join(outside))
