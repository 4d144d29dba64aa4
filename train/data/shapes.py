"""The arrays of a case, by their types and shapes."""

import numpy as np
from jaxtyping import Float, Float32, UInt8

Affine = Float[np.ndarray, "4 4"]
"""From voxel index to millimetres."""
Scan = Float[np.ndarray, "*spatial channels"]
"""Intensities as stored."""
Image = Float32[np.ndarray, "*spatial channels"]
"""Normalised intensities."""
Ids = UInt8[np.ndarray, "*spatial"]
"""Class ids; `IGNORE` is a voxel without a label."""
Annotations = UInt8[np.ndarray, "*spatial annotators"]
"""Class ids of each annotator."""
Shares = Float32[np.ndarray, "*spatial classes"]
"""Probabilities, or shares of annotators."""
