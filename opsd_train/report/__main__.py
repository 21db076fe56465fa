"""`python -m opsd_train.report RUN [RUN ...] [--output PAGE]`: one run, or several compared."""

import argparse
import sys
from pathlib import Path

from opsd_train.report import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train.report",
        description="One self-contained page on a run, or on several beside each other.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--output", type=Path, help="default: report.html in the run's folder; of several, here"
    )
    options = parser.parse_args(arguments)
    alone = options.runs[0] if len(options.runs) == 1 else Path()
    output = options.output or alone / "report.html"
    try:
        write_report(options.runs, output)
    except (OSError, ValueError) as error:
        sys.exit(f"opsd_train.report: {error}")
    print(output)


if __name__ == "__main__":
    main()
