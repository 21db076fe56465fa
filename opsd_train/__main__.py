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

import torch
from accelerate import Accelerator

from opsd_train.command_line import parse, quiet_libraries
from opsd_train.demo import find_demo
from opsd_train.errors import RunFailed
from opsd_train.run import be_quiet, check_distribution, check_tracker, fail, run_training
from opsd_train.sums import find_sums


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    quiet_libraries()
    # Micro-batches and dtypes are the config's, whatever a launcher would have them be.
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    if not accelerator.is_main_process:
        be_quiet()
    try:
        check_tracker(config.tracker)
        check_distribution(config, accelerator)
        run_training(find_sums(find_demo(config, accelerator)), accelerator)
    except RunFailed as error:
        fail(str(error), error.status)
    except (OSError, ValueError) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(
            "no memory for the model, which each process loads whole, with --shard too: take a "
            f"smaller one, or a larger card. ({error})"
        )
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", status=130)
