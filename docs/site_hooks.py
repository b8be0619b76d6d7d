"""What mkdocs does beside reading `docs/`: pages from files that live elsewhere, and links that hold in both places.

The documents are read on the site and in the repository. Pages link to each other, and to files outside `docs/`, by
paths that are right in the repository; for the site, links to pages that were taken over lead there, and links to other
files of the repository become plain text.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

PAGES = {
    "docs/tutorial.ipynb": "tutorial.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        path.relative_to(ROOT).as_posix(): f"metric_cards/{path.parent.name}.md"
        for path in sorted((ROOT / "hf_iau" / "metrics").glob("*/README.md"))
    },
}
"""Files of the repository that are pages of the site, with the name they have there."""

SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose text lies elsewhere."""
    for source, page in PAGES.items():
        path = ROOT / source
        text = notebook_text(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into links of the site."""
    source = PurePosixPath(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return re.sub(
        r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", lambda found: link(found[1], found[2], source, page.file.src_uri), markdown
    )


def link(words: str, target: str, source: PurePosixPath, page: str) -> str:
    """One Markdown link of the file `source`, as it has to be on the site's page `page`."""
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return f"[{words}]({target})"
    place = os.path.normpath(f"{source.parent.as_posix()}/{path}")
    if place in PAGES:
        there = PAGES[place]
    elif place.startswith("docs/"):
        there = place.removeprefix("docs/")
    else:  # a file of the repository that is no page
        return words
    relative = os.path.relpath(there, PurePosixPath(page).parent.as_posix())
    return f"[{words}]({relative}{'#' + anchor if anchor else ''})"


def notebook_text(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        for output in cell.get("outputs", []):
            printed = "".join(output.get("text") or output.get("data", {}).get("text/plain", []))
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)
