"""Images from an exported pipeline with ONNX Runtime and numpy: torch, diffusers and transformers are never imported.

Nothing in this package may import what a server without torch has not. `noise` has torch's normal numbers, `schedulers`
has diffusers' schedulers.
"""
