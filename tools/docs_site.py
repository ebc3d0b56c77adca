"""What mkdocs does to the pages beside building them: hooks, named in mkdocs.yml.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of the site (index.md, contributing.md, changelog.md). A link
from one page to another is rewritten to lead there. A link to what is no page, such as a folder of the source, becomes
its text.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    for source, page in TOP_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def source_of(page: str) -> PurePosixPath:
    """Where a page of the site lies in the project."""
    for source, top_page in TOP_PAGES.items():
        if page == top_page:
            return PurePosixPath(source)
    return PurePosixPath("docs") / page


def page_of(source: str) -> str | None:
    """The page of the site, or the image, that a file of the project is; None: none."""
    if source in TOP_PAGES:
        return TOP_PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") and (ROOT / source).is_file() else None


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = source_of(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        text, link = match["text"], match["link"]
        where, _, anchor = link.partition("#")
        if not where or re.match(r"[a-z]+:", link):
            return match[0]
        target = page_of(os.path.normpath(source.parent / where))
        if target is None:
            return text
        relative = os.path.relpath(target, PurePosixPath(page.file.src_uri).parent)
        return f"{match['image']}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(?P<image>!?)\[(?P<text>[^\]]+)\]\((?P<link>[^)\s]+)\)", rewritten, markdown)
