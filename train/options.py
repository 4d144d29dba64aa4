"""Refuses options that are given on the command line but have no effect."""

from collections.abc import Collection, Iterator
from typing import Any

from train.errors import InputError
from train.losses import parse_loss
from train.terms import TERMS


def check_given(command: Any, given: Collection[str]) -> None:
    """Checks that each option on the command line has an effect.

    Args:
        command: a command of `train.cli` that trains or imports a network.
        given: names of the options on the command line, see `train.cli.given_options`.

    Raises:
        InputError: names an option without effect.
    """
    trains = hasattr(command, "training")
    rules = _of_a_training(command) if trains else _of_an_import(command.data.data)
    for names, reason in rules:
        if unused := sorted(set(names) & set(given)):
            raise InputError(reason.replace("OPTION", unused[0]))


def _of_a_training(command: Any) -> Iterator[tuple[Collection[str], str]]:
    training, data = command.training, command.data
    losses = (command.loss,) if hasattr(command, "loss") else command.losses
    if not any(term.term.is_calibration for loss in losses for term in parse_loss(loss).terms):
        names = " and ".join(name for name, term in TERMS.items() if term.is_calibration)
        yield (
            ("ace_delay", "ace_ramp", "ignore_empty_classes"),
            f"OPTION is an option of the loss terms {names}, and {' '.join(losses)} has none of them: leave it out "
            "or add a term.",
        )
    if not training.warmup_steps:
        yield ("warmup_from",), "OPTION does nothing where warmup_steps is 0: leave it out."
    if training.warmup_steps > training.steps:
        yield (
            ("warmup_steps",),
            f"OPTION is {training.warmup_steps}, but the run has {training.steps} steps: give fewer.",
        )
    if getattr(command, "class_names", ()):
        yield ("data",), "OPTION is not opened where --class-names are given: leave one of them out."
    elif hasattr(command, "class_names"):
        yield ("num_channels",), "The data set says OPTION already: leave it out, or give --class-names too."
    if getattr(command, "seeds", ()):
        yield ("seed",), "OPTION does nothing beside --seeds: leave one of them out."
    if command.out is None:
        yield ("resume",), "--resume goes on with the run in --out: give --out too."
    if data.splits:
        yield (
            ("protocol", "num_test", *(() if data.fold is not None else ("num_val", "split_seed"))),
            "OPTION does nothing beside --splits, which names the cases: leave it out.",
        )
    if not data.spacing:
        yield (
            ("interpolation",),
            "OPTION does nothing without --spacing: give --spacing too, or leave OPTION out.",
        )
    options = vars(command.augment)
    for chance in [name for name in options if name.endswith("_prob") and not options[name]]:
        kind = chance.removesuffix("_prob")
        yield (
            [name for name in options if name.startswith(kind) and name != chance],
            f"OPTION does nothing where {chance} is 0: give a chance too.",
        )


def _of_an_import(data: str) -> Iterator[tuple[Collection[str], str]]:
    yield (
        ("foreground_crops", "loader_threads", "prefetch"),
        "OPTION is for training: leave it out here and give it to fit --init.",
    )
    if data:
        yield (
            ("num_channels", "spatial_dims"),
            "OPTION is for networks without --data; the data set says it already: leave it out.",
        )
    else:
        yield (
            (
                "num_test",
                "num_val",
                "split_seed",
                "splits",
                "protocol",
                "fold",
                "cache_dir",
                "annotators",
                "label_values",
                "subjects",
            ),
            "OPTION is about the cases of --data: give --data too, or leave OPTION out.",
        )
