"""Hidden states and a head whose distributions are those of a real model: 64 rows a side.

    python tests/real_rows.py MODEL      # a folder of SmolLM2-135M-Instruct; writes the file again

tests/data/real_rows.safetensors was made of 64 positions of the model's answers, read by student
and teacher (benchmarks/lib/real_states.py), without loss but for the last rounding to bf16:

- 128 hidden states span 128 directions. In these as coordinates, 576 features become 128, and no
  logit changes. Features of the hidden states and of the head are scaled to be of one size.
- Of 49,152 entries it has the 960 that are likeliest in any row of either side. In place of the
  others, 3 % of a row's mass in the median, it has 32 entries of equal mass. One feature more is
  their logit: in the head it is 1 for them and 0 for the 960.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).parent / "data" / "real_rows.safetensors"
ROWS, LIKELY, OTHERS = 64, 960, 32


def real_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """h_S, h_T [64, 129] and W [992, 129]."""
    kept = load_file(FILE)
    h_S, h_T, W = (kept[name].to(dtype) for name in ("h_S", "h_T", "W"))
    return h_S, h_T, W


def shrink(h_S: Tensor, h_T: Tensor, W: Tensor) -> dict[str, Tensor]:
    """What the file holds, of a model's hidden states and head."""
    h = torch.cat([h_S, h_T]).double()
    W = W.double()
    z = h @ W.t()
    likely = z.log_softmax(-1).amax(0).topk(LIKELY).indices
    of_others = z.index_fill(1, likely, -torch.inf).logsumexp(-1) - torch.tensor(OTHERS).log()
    # A constant of all logits of a row is no part of its distribution.
    middle = W[likely].mean(0)
    U, size, V = torch.linalg.svd(h @ (W[likely] - middle).t(), full_matrices=False)
    of_others -= h @ middle
    h = torch.cat([U * size.sqrt(), of_others[:, None]], dim=1)
    head = torch.zeros(LIKELY + OTHERS, h.shape[1], dtype=torch.float64)
    head[:LIKELY, :-1] = V.t() * size.sqrt()
    head[LIKELY:, -1] = 1
    h_S, h_T = h.split(len(h_S))
    made = {"h_S": h_S, "h_T": h_T, "W": head}
    return {name: t.bfloat16().contiguous() for name, t in made.items()}


def main(model: str) -> None:
    from benchmarks.lib import real_states

    h_S, h_T, W = real_states.states(model, answers=24, tokens=24)
    some = torch.linspace(0, len(h_S) - 1, ROWS).long()
    save_file(shrink(h_S[some], h_T[some], W), FILE)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1])
