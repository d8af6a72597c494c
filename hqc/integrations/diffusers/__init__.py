"""Quantised denoisers as models of diffusers: `import hqc.integrations.diffusers`, then `from_pretrained(folder)`.

Importing this enters hqc into diffusers' two tables of quantisation methods, which it reads when a model is loaded.
`hqc export --target diffusers` writes such a folder.
"""

from diffusers.quantizers import auto

from hqc.integrations.diffusers.config import METHOD, HqcConfig
from hqc.integrations.diffusers.quantizer import HqcQuantizer
from hqc.integrations.diffusers.writing import DiffusersReport, export_diffusers

__all__ = ["DiffusersReport", "HqcConfig", "HqcQuantizer", "export_diffusers"]

auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, HqcConfig)
auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, HqcQuantizer)
