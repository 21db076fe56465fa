"""Does the core of the suite pass with other versions of what we need? `make test-versions`

    python tests/versions.py [NAME ...] [--list] [pytest options]

An environment is made once, in .venv-versions/NAME, through constraints.txt without the packages
that the environment has in other versions. The core of the suite runs there, with PyTorch's CPU and
Triton's interpreter. benchmarks/results/versions.csv records the outcome; a page shows it
(benchmarks/pages/readme.py). Without names: the environments that need no other PyTorch.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.lib import report, sources
from benchmarks.lib.records import TriedVersions

ROOT = Path(__file__).parents[1]

RECORDED = ROOT / "benchmarks" / "results" / "versions.csv"
PLACE = ROOT / ".venv-versions"
COLUMNS = [f.name for f in fields(TriedVersions)][1:10]  # versions, Python's first


@dataclass(frozen=True)
class Environment:
    """Versions to try, as pip's requirements. constraints.txt does not bind the packages."""

    packages: tuple[str, ...] = ()
    python: str = ""  # as 3.12; "" is the Python that runs this script
    by_name_alone: bool = False  # its PyTorch may bring gigabytes of CUDA's libraries


# What the lower bounds of pyproject.toml admit.
OLDEST = (
    "triton==3.6.0",
    "numpy<2.4",  # which the interpreter of Triton 3.6 needs
    "transformers==5.23.0",
    "trl==1.16.0",
    "peft==0.19.0",
    "accelerate==1.10.1",
    "datasets==4.7.0",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
)
NEWEST = (
    "triton==3.9.0",
    "transformers==5.24.0",
    "trl==1.16.0",
    *("numpy", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface-hub"),
)
ENVIRONMENTS = {
    "oldest": Environment(OLDEST),
    "newest": Environment(NEWEST),
    "torch-oldest": Environment(("torch==2.10.0", "triton==3.6.0", "numpy<2.4"), "", True),
    "torch-newest": Environment(("torch==2.15.0", "triton==3.9.0"), "", True),
    "python-3.10": Environment((), "3.10", True),
    "python-3.12": Environment((), "3.12", True),
    "python-3.13": Environment((), "3.13", True),
}
# TRL imports requests where a teacher is on a server, and does not require it.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "mpmath", "requests")

# What another version may break: files of tests, and single ones of a file.
CORE = (
    # Kernels interpreted, and all of them compiled ahead of time.
    "kernels::pointwise_is_the_family",
    "kernels::lse",
    "kernels::pair",
    "kernels::rows_of_infinite_divergence",
    "resources::no_atomics",
    # Losses beside the oracle.
    "divergence",
    "against_oracle::large_logits_and_more_columns_than_a_tile",
    "loss::weights_and_reductions",
    "loss::autocast_rounds_like_a_linear_layer",
    "trained_head::other_losses",
    "top_k_loss::logit_free",
    # PyTorch's compiler.
    "compile::one_graph_and_the_same_numbers[everything-aot_eager-True-logit-free, cpu]",
    "compile::one_graph_and_the_same_numbers[jsd-inductor-None-row workspace, cpu]",
    "compile::fake_tensors",
    "compile::the_operator_does_what_it_declares",
    # Heads and models of transformers.
    "head_of_model",
    "heads_of_others::a_family_that_is_known",
    "heads_of_others::what_accelerate_compile_and_peft_wrap",
    "train_models",
    # TRL.
    "trl::a_run_is_the_same",
    "trl::what_distillation_calls",
    "trl::what_ours_does_the_work_of_is_looked_at_too",
    "trl_routes::every_trainer_that_distils_is_known",
    "trl_server::a_run_with_a_server_is_the_same",
    # Training.
    "train_step",
    "train_opsd",
    "train_run::a_preset_shrunk_by_options_alone",
    "train_run::an_adapter_is_merged_into_a_new_folder",
)


def main() -> int:
    options = parse()
    outcomes = []
    for name in options.names or [n for n, e in ENVIRONMENTS.items() if not e.by_name_alone]:
        python = make(name)
        row = run(name, python, options.jobs)
        record(row)
        outcomes.append(row)
    for row in outcomes:
        print(f"{row.environment}: {row.passed} passed, {row.failed} failed")
    return int(any(row.failed for row in outcomes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time; 0: in one process")
    options = parser.parse_args()
    if unknown := set(options.names) - ENVIRONMENTS.keys():
        parser.error(f"NAME must be among {', '.join(ENVIRONMENTS)}; got {', '.join(unknown)}")
    return options


def make(name: str) -> Path:
    """The Python of an environment, which is made or mended if it is not as described."""
    environment, folder = ENVIRONMENTS[name], PLACE / name
    python, installed = folder / "bin" / "python", folder / ".installed"
    described = f"{environment}\n{bounds(environment)}"
    if installed.exists() and installed.read_text() == described:
        return python
    print(f"Installing {folder.relative_to(ROOT)} ...", flush=True)
    if not python.exists():
        base = f"python{environment.python}" if environment.python else sys.executable
        subprocess.run([base, "-m", "venv", folder], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(bounds(environment))
    wanted = [*environment.packages, "torch", "-e", f"{ROOT}[train,trl]", *TOOLS]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", constraints, *wanted], check=True)
    installed.write_text(described)
    return python


def bounds(environment: Environment) -> str:
    """constraints.txt without the packages that the environment names."""
    named = {re.split("[<=>]", package)[0] for package in environment.packages}
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.partition("==")[0] not in named)


def run(name: str, python: Path, jobs: int) -> TriedVersions:
    """Run the core of the suite in an environment."""
    print(f"Testing in {name} ...", flush=True)
    command = [python, "-m", "pytest", "-q", "-n", str(jobs), "--dist", "worksteal"]
    command += ["-p", "no:cacheprovider", *core()]
    log = PLACE / f"{name}.log"
    with log.open("w") as out:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    told = log.read_text()
    last = told.rstrip().rpartition("\n")[2]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if status.returncode:
        print(told[-3000:])
    return TriedVersions(
        environment=name,
        **versions(python),
        passed=counts.get("passed", 0),
        # A pytest that did not get so far as to count has failed too.
        failed=max(counts.get("failed", 0) + counts.get("error", 0), int(status.returncode != 0)),
        skipped=counts.get("skipped", 0),
        date=time.strftime("%Y-%m-%d"),
        code=sources.line(),
    )


def core() -> list[str]:
    """The tests, as pytest takes them."""
    parts = [test.partition("::") for test in CORE]
    return [f"tests/test_{file}.py" + (f"::test_{name}" if name else "") for file, _, name in parts]


def versions(python: Path) -> dict[str, str]:
    """The versions of an environment by column."""
    code = (
        "import json, platform; from importlib.metadata import version; "
        f"print(json.dumps({{name: version(name) for name in {COLUMNS[1:]}}} | "
        "{'python': platform.python_version()}))"
    )
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


def record(row: TriedVersions) -> None:
    """Put a row into the csv, in place of the environment's former one."""
    _, rows = report.read(RECORDED, TriedVersions) if RECORDED.exists() else ("", [])
    by_name = {r.environment: r for r in [*rows, row]}
    with RECORDED.open("w", newline="") as file:
        file.write("# The core of the suite in environments of their own (tests/versions.py)\n")
        writer = csv.DictWriter(file, [f.name for f in fields(TriedVersions)])
        writer.writeheader()
        writer.writerows(asdict(by_name[name]) for name in ENVIRONMENTS if name in by_name)


if __name__ == "__main__":
    sys.exit(main())
