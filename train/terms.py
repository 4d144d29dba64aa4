"""The loss terms. To add one, add an entry to `TERMS`: command line, help, checks and logs all read it.

A term from outside the project needs no entry: `package.module:function` names a function with the same arguments.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import calib_jax
from calib_jax._devices import whole_sum as whole_sum  # for terms from outside
from train.errors import InputError
from train.plugins import Call, check_arguments, import_object, is_external, keyword_parameters

_SUPPLIED = ("where", "axis_name")


@dataclass(frozen=True, eq=False)
class Term:
    """A loss term.

    Attributes:
        help: a few words for `--help`.
        function: `(logits, labels, *, where=None, axis_name=None, **parameters) -> scalar`. A function without
            `where` cannot leave voxels out. One without `axis_name` cannot work on volumes split over devices.
        part: a part of `calib_jax.segmentation_loss_parts`, which computes all such terms from one softmax.
        options: for a `part`, its options there by the names of the term's parameters.
        fixed: parameters that the term fixes.
        is_calibration: whether `ace_delay` and `ace_ramp` apply to its weight.
    """

    help: str
    function: Callable[..., Any] = calib_jax.segmentation_loss_parts
    part: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    is_calibration: bool = False

    @cached_property
    def accepted(self) -> dict[str, inspect.Parameter]:
        """The keyword arguments of `function`."""
        return keyword_parameters(self.function)

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that a loss may set, by name."""
        names = self.options or {
            name: name for name in self.accepted if name not in _SUPPLIED and not self.part
        }
        return {name: self.accepted[option] for name, option in names.items() if name not in self.fixed}


# `pool_images` is missing: its result would depend on how a batch is split over devices.
_ACE = ("num_bins", "binning", "closed", "include_background", "class_weights", "ignore_empty_classes")
_ACE_OPTIONS: Mapping[str, str] = dict(zip(_ACE, _ACE, strict=True))
_DICE_OPTIONS = {"smooth": "dice_smooth", "include_background": "dice_include_background"}

TERMS = {
    "dice": Term("soft Dice", part="dice", options=_DICE_OPTIONS),
    "dampeddice": Term("Dice whose gradient is damped by |p - y|", part="damped_dice", options=_DICE_OPTIONS),
    "ce": Term("cross-entropy", part="cross_entropy"),
    "ace": Term("mL1-ACE", part="ace", options=_ACE_OPTIONS, is_calibration=True),
    "softace": Term(
        "ace with soft bins",
        part="ace",
        options=_ACE_OPTIONS,
        fixed={"binning": "soft"},
        is_calibration=True,
    ),
    "focal": Term("focal loss", calib_jax.focal_loss),
    "ls": Term("cross-entropy with label smoothing", calib_jax.label_smoothing_loss),
    "svls": Term(
        "cross-entropy with spatially varying label smoothing",
        calib_jax.spatially_varying_label_smoothing_loss,
    ),
    "mbls": Term("cross-entropy with margin-based label smoothing", calib_jax.margin_label_smoothing_loss),
    "nacl": Term("cross-entropy with the neighbour-aware penalty", calib_jax.neighbor_aware_loss),
    "dscpp": Term("DSC++", calib_jax.dsc_plus_plus_loss),
}


def is_term(name: str) -> bool:
    """Whether a column of `log.csv` is a loss term: a name in `TERMS`, or `package.module:function`."""
    return name in TERMS or is_external(name)


def find_term(call: Call) -> Term:
    """The term that a call names, with the call's arguments checked.

    Raises:
        InputError: if the name is unknown, cannot be imported or is no function, or if the arguments do not fit it.
    """
    if is_external(call.name):
        function = import_object(call.name)
        if not callable(function):
            raise InputError(f"Loss term {call.name} is {function!r}: name a function (logits, labels, ...).")
        term = Term("", function)
    elif call.name in TERMS:
        term = TERMS[call.name]
    else:
        raise InputError(
            f"Unknown loss term {call.name!r}; terms are {', '.join(TERMS)}, and package.module:function for a "
            "function of your own."
        )
    check_arguments(call, term.parameters)
    return term


def describe() -> str:
    """The loss language and all terms with their parameters, for `--help`."""
    terms = "; ".join(f"{_signature(name, term)}, {term.help}" for name, term in TERMS.items())
    return (
        "terms joined by + and weighted, as in dice+0.5*ace or 'dice+2*ace(num_bins=15)'. Terms with their "
        f"parameters: {terms}; or a function of your own, as in 'my_package.my_losses:tversky(alpha=0.3)'."
    )


def _signature(name: str, term: Term) -> str:
    parameters = ", ".join(f"{key}={parameter.default}" for key, parameter in term.parameters.items())
    return f"{name}({parameters})" if parameters else name
