"""The hash by which Triton finds a compiled kernel."""

import importlib
import pkgutil


def settle_hashes() -> None:
    """Give every kernel of the package the hash that all processes find.

    A hash of Triton's depends on which functions were hashed before it in the process: a callee's
    global values count in its caller's only if the callee came first. In one order, each in turn,
    all processes agree, and find in the cache what another has compiled. It needs Triton.
    """
    from opsd_kernels import kernels

    for found in pkgutil.iter_modules(kernels.__path__):  # by name
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        for function in vars(module).values():
            getattr(function, "cache_key", None)
