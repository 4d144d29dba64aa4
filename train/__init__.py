"""`python -m train`: what a calibration loss does to a segmentation network, shown on real volumes."""
