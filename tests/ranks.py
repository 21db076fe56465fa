"""Processes that work together, forked from one that has imported everything already."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import processes


def on_ranks(
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    *args: Any,
    start_method: str = "forkserver",
) -> list[Any]:
    """What `function(rank, *args)` returns on each rank, by way of files in `folder`.

    The environment is that of a launcher; the function initializes its process group. With
    `start_method="fork"` this process is the one that is forked.
    """
    if start_method == "forkserver":
        processes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (function, world_size, port, folder, args)
    torch.multiprocessing.start_processes(
        _on_rank, given, nprocs=world_size, start_method=start_method
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _on_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    port: int,
    folder: Path,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.improve()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
