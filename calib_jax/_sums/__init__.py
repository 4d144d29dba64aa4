"""Sums over voxels that stay exact at any size: per image (`voxels`) and per bin."""
