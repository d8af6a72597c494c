"""Bits and LoRA ranks together under a budget (QR-Adaptor, arXiv 2505.03802): `hqc qr-adaptor`.

`space` is what may be chosen and what it is predicted to cost and to err, `gains` what a short training is worth at
every site, `front` the best plans by NSGA-II, `gaussian` the process that says which to train next, `run` all of it,
`plot` a picture.
"""

from hqc.search.joint.run import Adapted, AskedJointly, adapt

__all__ = ["Adapted", "AskedJointly", "adapt"]
