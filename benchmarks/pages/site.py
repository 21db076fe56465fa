"""A hook of mkdocs: the site has the pages where the repository has them, README.md first.

So a link that works in the repository works in the site, and `mkdocs build --strict` finds one that
does not. Code that a page links to is copied beside it. A diagram, which GitHub draws, is a table
in the site: what draws diagrams would have to be fetched.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = (
    "*.md",
    "CITATION.cff",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.svg",
    "docs/site.css",
    "examples/*",
    "opsd_train/**/*.py",
    "opsd_train/presets/*.yaml",
    "benchmarks/README.md",
    "benchmarks/**/*.py",
    "benchmarks/gpu/*.txt",
    "benchmarks/results/*.csv",
    "benchmarks/results/**/*.png",
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The files of the site: those of the repository that `PATTERNS` name, and the theme's."""
    root = Path(config.config_file_path).parent
    paths = sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
    made = Files([file for file in files if Path(config.docs_dir) not in _folders(file)])
    for path in paths:
        if path.is_file():
            name = path.relative_to(root).as_posix()
            made.append(File.generated(config, name, abs_src_path=str(path)))
    return made


def _folders(file: File) -> list[Path]:
    return [] if file.abs_src_path is None else list(Path(file.abs_src_path).parents)


DIAGRAM = re.compile(r"^```mermaid\nflowchart TD\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NODE = r'(\w+)(?:\["(.*?)"\])?'
ARROW = re.compile(rf"^ *{NODE} --> {NODE}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return DIAGRAM.sub(lambda diagram: diagram_as_table(diagram[1]), markdown)


def diagram_as_table(arrows: str) -> str:
    """A row for each node that has a label: its name, what it is, and where its arrows lead."""
    labels, leads = dict[str, str](), dict[str, list[str]]()
    for start, start_label, end, end_label in ARROW.findall(arrows):
        for node, label in ((start, start_label), (end, end_label)):
            if label:
                labels[node] = label
        leads.setdefault(start, []).append(end)
    names = {node: f"`{label.partition('<br/>')[0]}`" for node, label in labels.items()}
    rows = [
        (name, labels[node].partition("<br/>")[2], "; ".join(names[n] for n in leads.get(node, ())))
        for node, name in names.items()
    ]
    head = "| | what it is | uses |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)
