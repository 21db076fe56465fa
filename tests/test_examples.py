"""Examples run as they say, and what they show is right."""

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from inputs import random_inputs

from examples import sequence_parallel
from opsd_kernels import reference_jsd_loss

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_sequence_parallel_with_two_processes():
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(EXAMPLES / "sequence_parallel.py")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    numbers = re.findall(r"\d\.\d{6}", run.stdout)
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]
    difference = re.search(r"differ by (\S+) of", run.stdout)
    assert difference
    assert float(difference[1]) < 1e-6


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("sizes", [[5, 15], [3, 0, 17], [20]])
def test_the_parts_of_a_mean(sizes, averaged):
    """Ragged shares, one of them empty: their sum, or the average that DDP takes, is the mean."""
    h_S, h_T, W = random_inputs(20, 60, 8, distance=0.5)
    w = torch.arange(20) % 4 + 0.5
    true_h = h_S.double().requires_grad_()
    true = reference_jsd_loss(true_h, h_T.double(), W.double(), token_weights=w)
    true.backward()
    h = h_S.clone().requires_grad_()
    parts, begin = [], 0
    for size in sizes:
        mine = slice(begin, begin + size)
        begin += size
        with (
            mock.patch("torch.distributed.all_reduce", lambda t: t.copy_(w.sum())),
            mock.patch("torch.distributed.get_world_size", return_value=len(sizes)),
        ):
            parts.append(
                sequence_parallel.mean_over_group(h[mine], h_T[mine], W, w[mine], averaged=averaged)
            )
    loss = sum(parts) / (len(sizes) if averaged else 1)
    loss.backward()
    torch.testing.assert_close(loss.double(), true.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(h.grad.double(), true_h.grad, rtol=1e-4, atol=1e-7)
