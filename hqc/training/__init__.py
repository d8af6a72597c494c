"""The distillation loop that trains a quantised graph against the float graph."""

from hqc.training.distillation import StepRecord, distil

__all__ = ["StepRecord", "distil"]
