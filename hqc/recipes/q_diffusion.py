"""Q-Diffusion: post-training quantisation by block reconstruction (ICCV 2023, arXiv 2302.04304).

    conv([X_0; X_1], W) = Q_0(X_0)*Q(W_0) + Q_1(X_1)*Q(W_1)    a layer that reads a concatenation: a quantiser a part
    W_q = s·clip(⌊W/s⌋ + h(α), low, high)                      AdaRound: λ·Σ(1 - |2h - 1|^β) drives every h to 0 or 1
    min ‖block(x̂; W_q) - block(x)‖²                            block by block, x̂ through the quantised blocks before it
    then the activation scales, block by block (LSQ)           inputs spread evenly over the timesteps, both halves of
                                                               guidance among them; one static scale a tensor

The sum goes over all weights of a block, both parts of a split layer too: the released code leaves out the second part.

The paper's numbers: 5120 inputs (20 steps, 256 each), batches of 32, 20 000 steps a block at rate 1e-3 for the
rounding, 5000 at 4e-4 for the scales, λ = 0.01, β from 20 to 2 after a warm-up of 20 %. The defaults here take minutes
on two cores: 640 inputs, 300 steps at 3e-2, and 100 for the scales. With time (it changes both):

    --set reconstruct.samples=128 --set reconstruct.iterations=20000 --set reconstruct.rate=1e-3

Attention's q, k and v have the asked bits, its softmax 8, with codes from 0; all have one static scale, which is learnt
with those of the block's layers. Both products are products of integers in `onnxruntime`, of quantised reals in
`portable`; TensorRT and the GPU runtime compute attention in float, and say so. Float attention everywhere, as one
operator:

    --set insert_attention_qdq.softmax_bits=0 --set insert_attention_qdq.operands=float

Own choices: shortcuts take the asked bits in every model (the paper's commands split for CIFAR-10 and Stable Diffusion
only, its LSUN commands do not); weights are symmetric, with scales by MSE search; activations are asymmetric up to 7
bits, symmetric at 8, where codes q - z do not fit int8; the rate of scales is relative to the scale; a block keeps what
it had where the samples show no gain.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.passes import DropSingleKeyAttention, InsertAttentionQdq, InsertQdq, OpenAttention, SelectLayers, SplitConcat
from hqc.recipes.recipe import Recipe
from hqc.training import Reconstruct

__all__ = ["Q_DIFFUSION"]

Q_DIFFUSION = Recipe(
    name="q-diffusion",
    source="arXiv 2302.04304",
    steps=(
        DropSingleKeyAttention(),
        OpenAttention(),
        SplitConcat(),
        SelectLayers(rules="all"),
        InsertQdq(activation="asymmetric", static=True),
        InsertAttentionQdq(operands="asymmetric", static=True),
        CalibrateWeights(),
        Reconstruct(learn="rounding"),
        CalibrateActivations(samples=16, candidates=80, power=2.4),
        Reconstruct(learn="activation_scales", iterations=100, rate=1e-3),
    ),
    doc=__doc__,
)
