"""Put what was recorded into the README: each table stands between two marks and is generated.

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
        before, *places, after = marks.split(text)
        if len(places) != 2:
            raise ValueError(f"README.md has no place for the table of {name}, or two")
        text = f"{before}{places[0]}\n{table}\n\n{places[1]}{after}"
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
