"""Calibration: scales from what the sites see along the float trajectory, and from the weights."""

from hqc.calibration.activations import CalibrateActivations, calibrate
from hqc.calibration.channel_bits import MixChannelBits
from hqc.calibration.lookup import FitLookup
from hqc.calibration.lora_start import InitLora
from hqc.calibration.low_rank import Decompose
from hqc.calibration.rotations import ChooseRotation
from hqc.calibration.smoothing import Smooth
from hqc.calibration.softmax import ChooseSoftmax
from hqc.calibration.weights import CalibrateWeights, mse_weight_scale

__all__ = [
    "CalibrateActivations",
    "CalibrateWeights",
    "ChooseRotation",
    "ChooseSoftmax",
    "Decompose",
    "FitLookup",
    "InitLora",
    "MixChannelBits",
    "Smooth",
    "calibrate",
    "mse_weight_scale",
]
