"""A hook of MkDocs: pages from outside of docs/, links to them, and the API reference from ``natten_ext.__all__``.

The pages are written to be read in the repository, where README.md and others are a folder above; a site has one.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import natten_ext

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""By their names in the repository, names on the site (where README.md would be the index)."""

_LINK = re.compile(r"(\]\()([^):#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / name).read_text(), ROOT)))
    for result in sorted((ROOT / "benchmarks" / "results").iterdir()):
        files.append(File.generated(config, f"results/{result.name}", abs_src_path=str(result)))
    names = [name for name in natten_ext.__all__ if not name.startswith("_")]
    reference = "\n\n".join(f"::: natten_ext.{name}" for name in names)
    files.append(File.generated(config, "api.md", content=f"# API\n\n{reference}\n"))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    return markdown if page.file.generated_by else _moved(markdown, ROOT / "docs")


def _moved(text: str, folder: Path) -> str:
    """The text of a page of ``folder``, with links to files of the repository as the site names them."""

    def link(match: re.Match) -> str:
        target = Path(folder, match[2]).resolve()
        name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else match[2]
        if name.startswith("benchmarks/results/"):
            name = name.removeprefix("benchmarks/")
        name = PAGES.get(name, name.removeprefix("docs/"))
        return f"{match[1]}{name}{match[3]}"

    return _LINK.sub(link, text)
