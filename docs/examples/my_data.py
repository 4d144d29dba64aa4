"""A data set of one's own: images and labels in a folder of `.npz` files, without a change of the project.

    python -m train fit --data "my_data:cells(folder='scans')" --num-test 2 --num-val 0 --out runs/cells

Each file holds `image` [height, width, channels] and `label` [height, width] with class ids.
"""

from pathlib import Path

import numpy as np

from train.data import ArrayDataset


def cells(folder: str = "scans") -> ArrayDataset:
    """The data set that `--data my_data:cells` opens."""
    files = {file.stem: file for file in sorted(Path(folder).glob("*.npz"))}

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        with np.load(files[name]) as arrays:
            return arrays["image"], arrays["label"]

    return ArrayDataset("cells", ("background", "cell"), tuple(files), read)
