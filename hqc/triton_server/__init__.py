"""Exports as models of Triton Inference Server. Importing this loads nothing heavy."""

from hqc.triton_server.config import ModelConfig, Port
from hqc.triton_server.repository import TritonModel, write_triton_model

__all__ = ["ModelConfig", "Port", "TritonModel", "write_triton_model"]
