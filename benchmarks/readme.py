"""Put what was recorded into the README: each table of results stands between two marks.

python benchmarks/readme.py
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import accuracy, memory, report, resources, roofline, speed, step

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def generated(text: str) -> str:
    """The README's text, with the tables of the recorded results."""
    for name, table in tables().items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        parts = marks.split(text)
        if len(parts) != 4:
            raise ValueError(f"README.md has no place for the table of {name}, or two")
        before, start, end, after = parts
        text = f"{before}{start}\n{table}\n\n{end}{after}"
    return text


def tables() -> dict[str, str]:
    benchmarks = {"accuracy": accuracy, "memory": memory, "speed": speed, "step": step}
    found = {name: module.summary(RESULTS / f"{name}.csv") for name, module in benchmarks.items()}
    setting, rows = report.read(RESULTS / "roofline.csv", roofline.Row)
    return {
        **found,
        "roofline": roofline.summary(rows, setting),
        "resources": resources.summary(RESULTS / "resources.csv"),
    }


if __name__ == "__main__":
    README.write_text(generated(README.read_text()))
