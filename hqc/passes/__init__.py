"""The rewrites, one a file, in the order in which data meets them."""

from collections.abc import Mapping

from hqc.passes.attach_branch import AttachBranch
from hqc.passes.attach_lora import AttachLora
from hqc.passes.attach_style import AttachStyle
from hqc.passes.drop_single_key_attention import DropSingleKeyAttention
from hqc.passes.finetune_only import FinetuneOnly
from hqc.passes.float_attention import FloatAttention
from hqc.passes.freeze_integers import FreezeIntegers
from hqc.passes.insert_attention_qdq import InsertAttentionQdq
from hqc.passes.insert_hadamard import InsertHadamard
from hqc.passes.insert_qdq import InsertQdq
from hqc.passes.insert_smoothing import InsertSmoothing
from hqc.passes.merge_lora import MergeLora
from hqc.passes.merge_style import MergeStyle
from hqc.passes.open_attention import OpenAttention
from hqc.passes.pack_int4 import PackInt4
from hqc.passes.rotate_weights import RotateWeights
from hqc.passes.select_layers import SelectLayers
from hqc.passes.split_concat import SplitConcat
from hqc.passes.split_digits import SplitDigits
from hqc.passes.split_signs import SplitSigns
from hqc.steps import step_name

__all__ = [
    "PASSES",
    "AttachBranch",
    "AttachLora",
    "AttachStyle",
    "DropSingleKeyAttention",
    "FinetuneOnly",
    "FloatAttention",
    "FreezeIntegers",
    "InsertAttentionQdq",
    "InsertHadamard",
    "InsertQdq",
    "InsertSmoothing",
    "MergeLora",
    "MergeStyle",
    "OpenAttention",
    "PackInt4",
    "RotateWeights",
    "SelectLayers",
    "SplitConcat",
    "SplitDigits",
    "SplitSigns",
]

PASSES: Mapping[str, type] = {
    step_name(kind): kind
    for kind in (
        MergeStyle,
        DropSingleKeyAttention,
        OpenAttention,
        SplitConcat,
        SplitSigns,
        SelectLayers,
        InsertSmoothing,
        AttachBranch,
        InsertHadamard,
        InsertQdq,
        InsertAttentionQdq,
        FinetuneOnly,
        AttachLora,
        MergeLora,
        AttachStyle,
        FloatAttention,
        FreezeIntegers,
        RotateWeights,
        SplitDigits,
        PackInt4,
    )
}
"""Every pass by the name that pipeline text uses."""
