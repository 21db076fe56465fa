"""`python -m opsd_train.from_gguf FILE.gguf FOLDER`: the model of a GGUF file, as a folder that
transformers loads.

The weights are widened to fp32: 4 bits that llama.cpp packs cannot carry a gradient. What rounding
to them has lost stays lost.
"""

import argparse
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opsd_train.command_line import command
from opsd_train.models import save_model
from opsd_train.run import say


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opsd_train.from_gguf",
        description="Write the model of a GGUF file into a new folder, its weights in fp32.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="a folder that is not there")
    options = parser.parse_args(arguments)
    with command("out of memory: convert on a machine with more"):
        convert(options.file, options.output)


def convert(file: Path, output: Path) -> None:
    """Model, tokenizer and chat template. The folder is there whole, or not.

    Raises:
        OSError: there is no such file, or the folder is there already.
        ValueError: gguf is not installed, the file holds no model that transformers knows, or says
            something of the model that transformers would not read.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already; name a new folder")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    if find_spec("gguf") is None:
        raise ValueError("GGUF needs gguf; install it with `pip install 'opsd-kernels[gguf]'`")
    say(f"Reading {file} ...")
    folder, name = file.parent, file.name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # of a file in which anything may stand
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    read, found = loaded
    check_whole(file, read, found)
    # transformers takes what it read for quantized still, and would not save it.
    config = read.config
    vars(config).pop("quantization_config", None)
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    save_model(output, model, tokenizer)
    say(f"Wrote {output}: {type(model).__name__}, {model.num_parameters():,} parameters in fp32")


def check_whole(file: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raises:
    ValueError: the file lacks weights, which would be random; or it scales rotary positions, and
        the model that was read does not.
    """
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{file} lacks {len(missing)} weights of the model, as {missing[0]}")
    reader = import_module("gguf").GGUFReader(file)
    names = [*reader.fields, *(tensor.name for tensor in reader.tensors)]
    scaling = [name for name in names if ".rope.scaling." in name or "rope_freqs" in name]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if scaling and rope.get("rope_type", "default") == "default":
        raise ValueError(
            f"{file} scales rotary positions ({scaling[0]}), which transformers does not read from "
            "GGUF: the model would be another. Take its folder from the hub"
        )


if __name__ == "__main__":
    main()
