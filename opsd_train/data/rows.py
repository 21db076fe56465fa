"""Rows of a data set, from files or the hub. A row that cannot be read is handed on as an error,
with its place, so that all of them are known at once."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

Row = tuple[str, "dict[str, Any] | ValueError"]
"""The place to look for it, and its cells; or what is wrong with it."""

UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such files begin


def rows(data: str, split: str) -> Iterator[Row]:
    """Rows of files, with commas between their names, or of a data set on the hub.

    Raises:
        OSError: a file or data set that cannot be read.
        ValueError: a file of another kind, or one that is broken as a whole.
    """
    files = _names(data)
    for name in files:
        path = Path(name)
        read = READERS.get(path.suffix.lower())
        if read is not None:
            if not path.exists():
                raise FileNotFoundError(f"{name} does not exist")
            yield from read(path)
        elif path.is_file() or len(files) > 1:
            raise ValueError(
                f"{name} must be one of {', '.join(READERS)}, or a data set on the hub or a folder"
                " laid out like one"
            )
        else:
            yield from _data_set(name, name, split=split)


def is_data_set(data: str) -> bool:
    """Whether it is no list of files."""
    return Path(_names(data)[0]).suffix.lower() not in READERS


def _names(data: str) -> list[str]:
    return [data] if Path(data).exists() else [name.strip() for name in data.split(",")]


def _data_set(name: str, *of: str, **options: str) -> Iterator[Row]:
    """What `datasets.load_dataset` makes of the arguments behind the name."""
    try:
        found = datasets.load_dataset(*of, **options)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    for i, row in enumerate(found):
        yield f"{name}, row {i}", row


def _parquet(path: Path) -> Iterator[Row]:
    return _data_set(str(path), "parquet", data_files=str(path), split="train")


def _json_lines(path: Path) -> Iterator[Row]:
    # By hand, so that a broken line is known by its number.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if number == 1 and line.startswith(UTF_16):
                _decoded(line, f"{path}: ")
            try:
                if text := _decoded(line).strip():
                    yield place, _object(json.loads(text, object_pairs_hook=_members))
            except json.JSONDecodeError as error:
                yield place, ValueError(f"not JSON ({error})")
            except (ValueError, RecursionError) as error:
                yield place, ValueError(str(error))


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; or lines of them, which many call .json too."""
    text = _decoded(path.read_bytes(), f"{path}: ")
    try:
        values = json.loads(text or "[]", object_pairs_hook=_members)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path)
            return
        raise ValueError(f"{path}: not JSON: {error}") from None
    except RecursionError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(values, dict) and "\n" not in text.strip():
        values = [values]  # one line of such a file
    if not isinstance(values, list):
        keys = f" with keys {', '.join(values)}" if isinstance(values, dict) else ""
        raise ValueError(f"{path} must hold a list of objects, got {type(values).__name__}{keys}")
    for number, value in enumerate(values, start=1):
        yield f"{path}, object {number}", _object(value)


def _table(path: Path) -> Iterator[Row]:
    """Comma- or tab-separated, with a line of column names."""
    csv.field_size_limit(2**31 - 1)
    text = _decoded(path.read_bytes(), f"{path}: ")
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
        strict=True,
    )
    columns: list[str] | None = None
    number = 1
    while True:
        place, row = f"{path}, line {number}", None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, ValueError(f"not {path.suffix[1:]}: {error}")
        number = reader.line_num + 1
        if not row:
            continue
        if columns is None:
            columns = [name.strip() for name in row]
            if twice := {name for name in columns if columns.count(name) > 1}:
                raise ValueError(f"{place}: column {', '.join(sorted(twice))} is there twice")
        elif len(row) != len(columns):
            yield place, ValueError(f"has {len(row)} cells, and the first line {len(columns)}")
        else:
            yield place, dict(zip(columns, row, strict=True))


READERS = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}


def _decoded(data: bytes, where: str = "") -> str:
    """Text in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is in another encoding, which is not guessed.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data.startswith(UTF_16) else "ISO-8859-1"
        raise ValueError(
            f"{where}not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); convert the file,"
            f" with `iconv -f {encoding} -t UTF-8` if that is its encoding"
        ) from None


def _members(pairs: list[tuple[str, Any]]) -> "dict[str, Any] | ValueError":
    """An object, or what is wrong with it: a key that stands twice, for instance; Python takes
    the last."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    return ValueError(f"key {', '.join(twice)} is there twice") if twice else dict(pairs)


def _object(value: Any) -> "dict[str, Any] | ValueError":
    if isinstance(value, dict | ValueError):
        return value
    return ValueError(f"must be an object, got {type(value).__name__}")
