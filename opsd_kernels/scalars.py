"""Check numbers and flags that are arguments. A refusal names the argument."""

import math
from numbers import Real

from .divergence import HUGE


def number(name: str, value: float) -> float:
    """Check that an argument is a number, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large: {value}") from None


def check_bool(name: str, value: bool) -> None:
    """Check that an argument is True or False: a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_beta(beta: float) -> float:
    """Check a β that is a number, and return it as a float."""
    beta = number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    return beta


# Outside this range a logit divided by T, or T divided by a logit, may not fit fp32.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-8, 1e36


def check_temperature(temperature: float, scale: float = 1.0) -> float:
    """Check T for a head that multiplies its logits by `scale`, and return T as a float."""
    temperature = number("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not LOWEST_TEMPERATURE <= temperature / scale <= HIGHEST_TEMPERATURE:
        of_scale = "" if scale == 1 else f" over a head's scale of {scale}"
        raise ValueError(
            f"temperature must lie in [{LOWEST_TEMPERATURE:g}, {HIGHEST_TEMPERATURE:g}], got "
            f"{temperature}{of_scale}"
        )
    return temperature


def check_clip(name: str, clip: float | None) -> float | None:
    """Check an entry clip or an advantage clip, and return it as a float."""
    if clip is None:
        return None
    clip = number(name, clip)
    if not 0 < clip < HUGE:
        raise ValueError(
            f"{name} must be positive and below {HUGE:g}, or None for no clip, got {clip}"
        )
    return clip


def check_weight(name: str, weight: float) -> float:
    """Check a weight of either sign, and return it as a float."""
    weight = number(name, weight)
    if not abs(weight) < HUGE:
        raise ValueError(f"{name} must be finite, and within ±{HUGE:g}, got {weight}")
    return weight
