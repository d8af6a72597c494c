"""PassionSR: one-step diffusion models and their autoencoders at 6 to 8 bits (CVPR 2025, arXiv 2411.17106).

    X̃ = (X - δ)/λ,  W̃ = λ·W,  b̃ = b + W·δ       a factor and a shift an input channel (LET), at first
                                                √(max|X|/max|W|) and the middle of the channel
    Q(X; B_l, B_u), s = (B_u - B_l)/(2ⁿ-1)      what is clipped at learns (LBQ); z = round(-B_l/s)
    stage A: λ, δ learn, B is the span of X̃ at every step          stage B: B learns, λ and δ stay
    L = Σ (x̂_0 - x_0)²,  x_0 = z/√ᾱ - √((1-ᾱ)/ᾱ)·ε   one call at timestep 999: x_0 is the restored image's latents

One step has no axis of time, so that scales are static. The autoencoder is quantised by the same recipe, its halves by
themselves (`hqc trace --part vae-encoder`): their loss is of the moments and of the image. `--images FOLDER` gives what
is restored, `--through` what of the pipeline is quantised already: in the paper's order encoder, UNet, decoder.

Own choices: real 0 is a code (z whole), so that padding is exact; a shift only where a bias takes it back exactly, in
linear layers and 1×1 convolutions without padding (the released code also shifts padded ones, with a map); operands of
8 bits are symmetric (codes q - z do not fit int8), so that there B is one boundary; rates are relative to what learns
(the paper: 1e-5), and fall linearly; gradients are cleared at every update (the released code does so once an epoch);
the pipeline keeps its text encoder, where the paper drops it for the encoding of one constant prompt. Attention's q, k,
v and softmax stay float (the released code quantises them), so that the paper's Q/s, K·s would change nothing: they go
into the weights of q and k, of which every output channel has a scale of its own, and leave each code what it is.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights, Smooth
from hqc.passes import DropSingleKeyAttention, InsertQdq, InsertSmoothing, SelectLayers, SplitConcat
from hqc.recipes.recipe import Recipe
from hqc.sampling import Sampler
from hqc.training import InImageSpace, LearnBounds, LearnFactors

__all__ = ["PASSIONSR"]

PASSIONSR = Recipe(
    name="passionsr",
    source="arXiv 2411.17106",
    steps=(
        DropSingleKeyAttention(),
        SplitConcat(),
        SelectLayers(),
        InsertSmoothing(shift=True),
        Smooth(by="max_ratio", samples=128),
        InsertQdq(activation="asymmetric", static=True),
        LearnFactors(losses=(InImageSpace(),), epochs=250),
        CalibrateWeights(),
        CalibrateActivations(samples=128),
        LearnBounds(losses=(InImageSpace(),), epochs=250),
    ),
    sampler=Sampler(num_inference_steps=1, guidance_scale=1.0, timestep=999),
    doc=__doc__,
)
