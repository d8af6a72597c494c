"""Sampling with fixed seeds, image grids, and fidelity metrics that always state their protocol.

`sampling` draws images, `metrics` compares them with the float model's, `trajectory_fidelity` the way to them, `grid`
shows them and `report` prints the figures. Nothing is imported here: torch and torchmetrics load only with the module
that needs them.
"""
