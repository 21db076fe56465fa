"""What of TRL is replaced, and how that is undone."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Of TRL, with which the tests ran.
TESTED = ("1.16.0",)
logger = logging.getLogger("opsd_kernels.trl")


@dataclass(frozen=True)
class Hook:
    """A function of TRL that is replaced."""

    module: str  # of TRL
    name: str  # within it: a function, or Class.method
    parameters: tuple[str, ...]  # that it has in the versions that are known
    replacement: str  # module:name in this package, of a function of the original and its arguments

    def owner(self) -> Any:
        """What the function is an attribute of."""
        owner: Any = importlib.import_module(self.module)
        for name in self.name.split(".")[:-1]:
            owner = getattr(owner, name)
        return owner

    @property
    def attribute(self) -> str:
        return self.name.split(".")[-1]


def _hook(trainer: str, module: str, method: str, replacement: str, *parameters: str) -> Hook:
    parameters = ("self", *parameters)
    return Hook(module, f"{trainer}.{method}", parameters, f"opsd_kernels.trl.{replacement}")


_SDFT, _SDPO = "trl.experimental.sdft.sdft_trainer", "trl.experimental.sdpo.sdpo_trainer"
_COMPUTE_LOSS = ("model", "inputs", "return_outputs", "num_items_in_batch")
_ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
HOOKS = [
    Hook(
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        (
            "student_hidden_states", "teacher_hidden_states",
            "student_lm_head_weight", "teacher_lm_head_weight",
            "completion_mask", "beta", "num_items_in_batch",
            "student_lm_head_bias", "teacher_lm_head_bias",
            "student_logit_scale", "teacher_logit_scale",
            "student_final_logit_softcapping", "teacher_final_logit_softcapping",
            "temperature",
        ),
        "opsd_kernels.trl.distillation:chunked_divergence_loss",
    ),
    *(
        hook
        for trainer, module in (("SDFTTrainer", _SDFT), ("SDPOTrainer", _SDPO))
        for hook in (
            _hook(trainer, module, "_compute_teacher_student_logits",
                  "self_distillation:token_losses", "model", "teacher_model", "inputs"),
            _hook(trainer, module, "_compute_self_distillation_loss",
                  "self_distillation:self_distillation_loss",
                  "model", "inputs", "distillation_logits"),
            _hook(trainer, module, "_compute_rollout_logps",
                  "self_distillation:rollout_logps", *_ROLLOUT),
        )
    ),
    _hook("GKDTrainer", "trl.experimental.gkd.gkd_trainer", "compute_loss",
          "on_policy:gkd_loss", *_COMPUTE_LOSS),
    _hook("GOLDTrainer", "trl.experimental.gold.gold_trainer", "compute_loss",
          "on_policy:gold_loss", *_COMPUTE_LOSS),
    _hook("IWOPDTrainer", "trl.experimental.iw_opd.iw_opd_trainer", "compute_loss",
          "on_policy:iw_opd_loss", *_COMPUTE_LOSS),
]  # fmt: skip


@dataclass
class Patches:
    """What was replaced. Calling it, or leaving it as a context manager, puts TRL's own back."""

    replaced: list[tuple[Any, str, Any, Any]] = field(default_factory=list)

    def __call__(self) -> None:
        while self.replaced:
            owner, name, own, ours = self.replaced.pop()
            # What somebody else has put in its place since is theirs to take away.
            if vars(owner).get(name) is ours:
                setattr(owner, name, own)

    def __enter__(self) -> "Patches":
        return self

    def __exit__(self, *_: object) -> None:
        self()


def apply_opsd_kernels_to_trl() -> Patches:
    """Let TRL's distillation trainers compute their losses with this package. To be called before a
    trainer trains; calling it again changes nothing.

    Returns:
        What undoes it: `undo = apply_opsd_kernels_to_trl()` and later `undo()`, or `with
        apply_opsd_kernels_to_trl(): …`.

    Raises:
        ImportError: there is no TRL.
        RuntimeError: a function of TRL that is to be replaced is not there, or takes other
            arguments than those known; the message names it, and nothing is replaced.

    A version of TRL other than those tested gets a warning; a trainer that cannot be imported
    another, and stays as it is.
    """
    if importlib.util.find_spec("trl") is None:
        raise ImportError('TRL is not installed: pip install "trl>=1.16"')
    version = importlib.metadata.version("trl")
    if version not in TESTED:
        warnings.warn(
            f"opsd_kernels.trl was tested with TRL {', '.join(TESTED)}, not with {version}: "
            "compare a few steps with and without it",
            stacklevel=2,
        )
    found = []
    for hook in HOOKS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that experimental trainers are experimental
                owner = hook.owner()
        except ImportError as error:
            warnings.warn(f"{hook.name} stays as it is: {error}", stacklevel=2)
            continue
        except AttributeError as error:
            raise RuntimeError(f"TRL {version} has no {hook.module}.{hook.name}") from error
        _check(hook, owner, version)
        found.append((hook, owner))
    patches = Patches()
    for hook, owner in found:
        own = vars(owner)[hook.attribute]
        if hasattr(own, "replaces"):
            continue
        ours = _replacement(own, _named(hook.replacement))
        setattr(owner, hook.attribute, ours)
        patches.replaced.append((owner, hook.attribute, own, ours))
    return patches


def _check(hook: Hook, owner: Any, version: str) -> None:
    function = vars(owner).get(hook.attribute)
    if function is None:
        raise RuntimeError(f"TRL {version} has no {hook.module}.{hook.name}")
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != hook.parameters:
        raise RuntimeError(
            f"{hook.module}.{hook.name} of TRL {version} takes {', '.join(parameters)}; known is "
            f"one that takes {', '.join(hook.parameters)}"
        )


def _replacement(own: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(own, *args, **kwargs)

    replacement.replaces = own  # type: ignore[attr-defined]
    return replacement


def _named(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


@functools.cache
def say_once(trainer: str, reason: str) -> None:
    """Warn that a trainer runs TRL's own code, and why."""
    logger.warning("%s computes its loss with TRL's own code: %s", trainer, reason)
