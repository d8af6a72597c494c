"""Calibration: scales from what the sites see along the float trajectory, and from the weights."""

from hqc.calibration.activations import calibrate

__all__ = ["calibrate"]
