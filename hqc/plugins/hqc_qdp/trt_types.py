"""TensorRT's data types and hqc's names of them."""

from collections.abc import Mapping
from typing import Any

import tensorrt as trt

__all__ = ["DTYPES", "NAMES", "NAMESPACE", "VERSION"]

NAMESPACE = "hqc"
VERSION = "1"

DTYPES: Mapping[str, Any] = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16, "int8": trt.int8}
NAMES: Mapping[str, str] = {dtype.name: name for name, dtype in DTYPES.items()}
"""By TensorRT's own name: the objects compare by value but are not all one object."""
