"""What a report says beyond the comparison of models: a summary in words, more tables, and pictures of cases."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURES = "figures/slices"
"""Folder of the pictures of slices, within the folder of the report."""

Point = tuple[str, str, str, float, float]


@dataclasses.dataclass(frozen=True)
class Section:
    """A sortable table with a heading.

    Attributes:
        title: heading.
        how: how to read the table, a few sentences.
        lines: rows of cells, the header first. The first cell of a row names it.
        place: name of the figures before which the section is shown, or "" for the end of the page.
    """

    title: str
    how: str
    lines: Sequence[Sequence[str]]
    place: str = ""

    def is_text(self, column: int) -> bool:
        """Whether a column holds words rather than numbers."""
        cells = [line[column] for line in self.lines[1:]]
        return not any(cell[:1] in {*"0123456789+-", "\N{MINUS SIGN}"} for cell in cells if cell)


@dataclasses.dataclass(frozen=True)
class CasePicture:
    """A slice of a case, as pictures side by side.

    Attributes:
        model, case: of the prediction.
        rank: why it is shown: `worst` or `best`.
        caption: its figures in words.
        panels: file name of each picture by its title, within `PICTURES`.
    """

    model: str
    case: str
    rank: str
    caption: str
    panels: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Details:
    """What `write_report` shows beside its results.

    Attributes:
        headline: the main finding; "" for the comparison of the models.
        summary: the findings in plain words, a few sentences for each model by its name.
        faults: what went wrong, one sentence each: cases that are not in the report.
        notices: what a reader should know about the files.
        sections: further tables.
        pictures: slices of the worst and best cases.
        legend: colours of the classes in the pictures, `#rrggbb` by name.
        volumes: true and predicted volume in ml of cases: (model, class, case, true, predicted).
        expected: expected and true Dice of cases: (model, class, case, expected, true).
    """

    headline: str = ""
    summary: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    faults: Sequence[str] = ()
    notices: Sequence[str] = ()
    sections: Sequence[Section] = ()
    pictures: Sequence[CasePicture] = ()
    legend: Mapping[str, str] = dataclasses.field(default_factory=dict)
    volumes: Sequence[Point] = ()
    expected: Sequence[Point] = ()

    def to_json(self) -> dict[str, Any]:
        """The details as a dictionary for `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Details":
        """The details that `to_json` made."""
        fields = dict(data)
        fields["sections"] = [Section(**one) for one in data["sections"]]
        fields["pictures"] = [CasePicture(**one) for one in data["pictures"]]
        return cls(**fields)

    def picture_files(self, folder: Path) -> dict[str, Path]:
        """Path of every picture in the folder of a report."""
        return {
            file: folder / PICTURES / Path(file).name
            for picture in self.pictures
            for file in picture.panels.values()
        }
