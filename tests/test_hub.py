"""The package as a kernel of Hugging Face's hub: loaded by `kernels`, with operators of its own."""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import kernels
import pytest
import torch

import opsd_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:  # it comes with pytest
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
HUB = ROOT / "hub"
BUILD = tomllib.loads((HUB / "build.toml").read_text(encoding="utf-8"))
ID = "_opsd_kernels_cpu_test"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The library as `get_kernel` would give it, from the layout that kernel-builder makes."""
    variant = tmp_path_factory.mktemp("hub") / "build/torch-cpu"
    variant.mkdir(parents=True)
    source = HUB / "torch-ext" / BUILD["general"]["name"].replace("-", "_")
    for path in source.iterdir():
        if path.name not in ("_ops.py", "__pycache__"):
            (variant / path.name).symlink_to(path.resolve())
    of_package = (source / "_ops.py").read_text(encoding="utf-8")
    (variant / "_ops.py").write_text(of_package.replace("opsd_kernels", ID), encoding="utf-8")
    digests = {
        str(path.relative_to(variant)): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in variant.rglob("*.py")
    }
    metadata = {
        "id": ID,
        "name": BUILD["general"]["name"],
        "version": BUILD["general"]["version"],
        "license": BUILD["general"]["license"],
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return kernels.get_local_kernel(variant.parents[1], backend="cpu")


def test_the_source_is_the_package():
    assert (HUB / "torch-ext/opsd_kernels").resolve() == ROOT / "opsd_kernels"
    owner = re.search(r"github\.com/([^/]+)/", (ROOT / "pyproject.toml").read_text())
    assert owner is not None
    assert BUILD["general"]["hub"]["repo-id"].split("/")[0] == owner[1]


def test_it_computes_what_the_package_computes(kernel):
    assert kernel.fused_jsd_loss is not opsd_kernels.fused_jsd_loss
    generator = torch.Generator().manual_seed(0)
    h_S, h_T, W = torch.randn(3, 40, 16, generator=generator)
    results = []
    for library in (kernel, opsd_kernels):
        h = h_S.clone().requires_grad_()
        loss = library.fused_jsd_loss(h, h_T, W)
        loss.backward()
        results.append((loss, h.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_its_operators_have_a_namespace_of_their_own(kernel):
    names = {"fill", "find_shard"}
    assert names <= set(dir(getattr(torch.ops, ID)))
    assert names <= set(dir(torch.ops.opsd_kernels))
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith(f"{ID}::")}
    of_package = {name for name in registered if name.startswith("opsd_kernels::")}
    assert {name.split("::")[1] for name in ours} == {n.split("::")[1] for n in of_package}


def test_it_compiles(kernel):
    h_S, h_T, W = torch.randn(3, 20, 8)
    loss = torch.compile(kernel.fused_jsd_loss, backend="eager", fullgraph=True)(h_S, h_T, W)
    assert torch.equal(loss, kernel.fused_jsd_loss(h_S, h_T, W))
