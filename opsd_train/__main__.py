"""`python -m opsd_train [preset | config.yaml] [--option value ...]`: from the command line to a
run."""

import sys

try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import rich  # noqa: F401
    import transformers  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    sys.exit(f"opsd_train needs {error.name}: install it with `pip install 'opsd-kernels[train]'`")

from opsd_train.command_line import command, parse
from opsd_train.demo import find_demo
from opsd_train.run import check_distribution, check_tracker, run_training

NO_MEMORY = (
    "no memory for the model, which each process loads whole, with --shard too: take a smaller "
    "one, or a larger card"
)


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    with command(NO_MEMORY) as accelerator:
        check_tracker(config.tracker)
        check_distribution(config, accelerator)
        run_training(find_demo(config, accelerator), accelerator)


if __name__ == "__main__":
    main()
