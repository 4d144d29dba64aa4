"""Options that were given on the command line but would do nothing."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from train.config import DataConfig
from train.data import AugmentConfig
from train.errors import InputError
from train.losses import TERMS, parse_loss


def check_given(command: Any, given: Collection[str]) -> None:
    """Checks that each option that was given has an effect.

    Args:
        command: options of a command, those of `train.cli`.
        given: names of those that were given, see `train.cli.given_options`.

    Raises:
        InputError: for the first that has none.
    """
    rules: list[tuple[Collection[str], str]] = []
    if hasattr(command, "training"):
        losses = (command.loss,) if hasattr(command, "loss") else command.losses
        rules += [*_of_training(command, losses), *_of_data(command.data), *_of_augmentation(command.augment)]
    elif hasattr(command, "class_names"):
        rules += _of_an_import(command.data.data)
    for names, reason in rules:
        if unused := sorted(set(names) & set(given)):
            raise InputError(reason.replace("OPTION", unused[0]))


def _of_training(command: Any, losses: Sequence[str]) -> Iterator[tuple[Collection[str], str]]:
    training = command.training
    if not any(TERMS[term] == "ace" for loss in losses for term, _ in parse_loss(loss).weights):
        yield (
            ("ace_delay", "ace_ramp", "ignore_empty_classes"),
            f"OPTION is an option of the loss terms ace and softace, and {' '.join(losses)} has neither: leave "
            "it out or add a term.",
        )
    if not training.warmup_steps:
        yield ("warmup_from",), "OPTION does nothing where warmup_steps is 0: leave it out."
    if training.warmup_steps > training.steps:
        yield (
            ("warmup_steps",),
            f"OPTION is {training.warmup_steps}, but the run has {training.steps} steps: give fewer.",
        )
    if getattr(command, "seeds", ()):
        yield ("seed",), "OPTION does nothing beside --seeds: leave one of them out."
    if command.out is None:
        yield ("resume",), "--resume goes on with the run in --out: give that too."


def _of_data(data: DataConfig) -> Iterator[tuple[Collection[str], str]]:
    if data.splits:
        yield (
            ("protocol", "num_test", *(() if data.fold is not None else ("num_val", "split_seed"))),
            "OPTION does nothing beside --splits, which names the cases: leave it out.",
        )
    if not data.spacing:
        yield ("interpolation",), "OPTION does nothing without --spacing: give that too or leave it out."


def _of_augmentation(augment: AugmentConfig) -> Iterator[tuple[Collection[str], str]]:
    for chance, names in (
        ("flip_prob", ("flip_axes",)),
        ("zoom_prob", ("zoom",)),
        ("rotation_prob", ("rotation",)),
        ("smooth_prob", ("smooth_std",)),
        ("gamma_prob", ("gamma",)),
        ("intensity_prob", ("intensity_scale", "intensity_shift")),
        ("noise_prob", ("noise_std",)),
    ):
        if not getattr(augment, chance):
            yield names, f"OPTION does nothing where {chance} is 0: give a chance too."


def _of_an_import(data: str) -> Iterator[tuple[Collection[str], str]]:
    yield (
        ("foreground_crops", "loader_threads", "prefetch"),
        "OPTION is for training: leave it out here and give it to fit --init.",
    )
    if data:
        yield (
            ("num_channels", "spatial_dims"),
            "OPTION is for networks without --data, which says it already: leave it out.",
        )
    else:
        yield (
            ("num_test", "num_val", "split_seed", "splits", "protocol", "fold", "cache_dir", "annotators"),
            "OPTION is about the cases of --data: give that too or leave it out.",
        )
