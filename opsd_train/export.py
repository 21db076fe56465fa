"""`python -m opsd_train.export RUN FOLDER`: a run's adapter merged into its model, as a folder that
transformers and vLLM load by itself.

The merged weights go into a new folder. Those that the run began with are the teacher, and stay as
they are: an adapter that is merged into 16-bit weights cannot be taken out again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from opsd_train.command_line import command
from opsd_train.models import load_adapter, load_model, load_tokenizer, save_model
from opsd_train.run import check_base, config_of_adapter, say


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train.export",
        description="Merge a run's adapter into its model, and write both as one new folder.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="a folder that is not there")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="folder of another adapter, such as a checkpoint's (default: the run's)",
    )
    options = parser.parse_args(arguments)
    with command("out of memory: merge on a machine with more"):
        export(options.run, options.output, options.adapter)


def export(run: Path, output: Path, adapter: Path | None = None) -> None:
    """Merged in fp32, and written in the dtype of the run.

    Raises:
        OSError: there is no run or adapter, or the folder is there already.
        ValueError: they do not fit together.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; name a new folder")
    config = config_of_adapter(run)
    say(f"Loading {config.model} ...")
    # Into whole weights, whatever they were quantized to while the adapter was trained.
    whole = load_model(config.model, replace(config, quantize="none"))
    model = load_adapter(whole, adapter or run / "adapter")
    if config.quantize == "none":
        check_base(run, model)
    merged = model.float().merge_and_unload()
    merged = merged.to(getattr(torch, config.dtype))
    save_model(output, merged, load_tokenizer(config.model))
    say(f"Merged into {output}: {config.model} and {adapter or run / 'adapter'}")


if __name__ == "__main__":
    main()
