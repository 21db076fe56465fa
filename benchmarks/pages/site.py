"""A hook of mkdocs: the site has the pages where the repository has them, README.md first.

So a link that works in the repository works in the site, and `mkdocs build --strict` finds one that
does not. Code that a page links to is copied beside it.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/site.css",
    "examples/*",
    "opsd_train/**/*.py",
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
