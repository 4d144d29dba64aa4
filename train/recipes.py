"""Published experiments as configurations: `python -m train fit --recipe paper_brats_dice_ace --data brats:PATH`.

`recipes.toml` holds their settings and `recipes.csv` their figures.
"""

import csv
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DeviceConfig, RunConfig, from_json
from train.errors import InputError
from train.published import Row, to_markdown

# With one patch of each device at a time, the step of the whole batch fits into 20 GiB.
DEVICES = DeviceConfig(accumulate=0)


@dataclass(frozen=True)
class Recipe:
    """A published experiment.

    Attributes:
        name: what it reproduces.
        source: where it was published.
        config: configuration of the run; its data are `LAYOUT:PATH`.
        published: figures of the test cases.
        differs: what this trainer does otherwise than the source.
    """

    name: str
    source: str
    config: RunConfig
    published: tuple[Row, ...]
    differs: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that trains and evaluates it."""
        temperature = " --temperature" if len(self.published) > 1 else ""
        return f"python -m train fit --recipe {self.name} --data {self.config.data.data}{temperature}"


def _read(ending: str) -> str:
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


def _recipes(settings: dict[str, Any], figures: dict[str, list[str]]) -> Iterator[Recipe]:
    """Every experiment under each loss that has figures: mean and standard deviation over cases of each metric."""
    for experiment, own in settings["experiments"].items():
        options: dict[str, Any] = {}
        differs: tuple[str, ...] = ()
        for part in (*(settings["parts"][name] for name in own["parts"]), own):
            for section, values in part.get("options", {}).items():
                options[section] = options.get(section, {}) | values
            differs += tuple(part.get("differs", ()))
        source = settings["sources"][own["source"]]
        for losses, loss in settings["losses"].items():
            rows = []
            # +T is with temperature scaling.
            for name in (own["figures"] + losses, f"{own['figures']}{losses}+T"):
                if name in figures:
                    numbers = map(float, figures[name])
                    pairs = tuple(zip(numbers, numbers, strict=True))
                    rows.append(Row(f"{source['label']}, {name}", own["cases"], pairs))
            if rows:
                config = from_json(RunConfig, {"loss": loss, **options})
                yield Recipe(f"{experiment}_{losses}", source["paper"], config, tuple(rows), differs)


_FIGURES = {name: figures for name, *figures in csv.reader(_read(".csv").splitlines())}
RECIPES = {recipe.name: recipe for recipe in _recipes(tomllib.loads(_read(".toml")), _FIGURES)}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        InputError: if there is none.
    """
    if name not in RECIPES:
        raise InputError(f"There is no recipe {name!r}: give one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def published(names: Sequence[str]) -> list[Row]:
    """The published figures of these recipes."""
    return [row for name in names for row in find_recipe(name).published]


def describe(recipes: Sequence[Recipe]) -> str:
    """Source, command, settings, published figures and differences of each recipe, as text."""
    texts = []
    for recipe in recipes:
        config, training = recipe.config, recipe.config.training
        lines = [
            recipe.name,
            f"  source    {recipe.source}",
            f"  command   {recipe.command}",
            f"  settings  {config.model.architecture}, {config.loss}, {training.steps} steps of "
            f"{training.batch_size} patches of {'x'.join(map(str, config.data.patch))}, learning rate "
            f"{training.learning_rate:g} ({training.schedule}), split {config.data.protocol}",
            *(f"  differs   {text}" for text in recipe.differs),
            *(f"  {line}" for line in to_markdown(recipe.published).splitlines()),
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)
