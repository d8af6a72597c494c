"""The whole chain against oracles that share no code with it: numpy int64 and float64, loops for the convolution."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from zoo import fingerprint

from hqc.calibration import mse_weight_scale
from hqc.passes import (
    AttachLora,
    FreezeIntegers,
    InsertHadamard,
    InsertQdq,
    MergeLora,
    PackInt4,
    RotateWeights,
    SelectLayers,
    SplitDigits,
)
from hqc.passes.split_digits import digit_limit
from hqc.pipeline import run_pipeline
from hqc.program import Program

GRID = (0.0, 300.0, 600.0, 900.0)
BITS = ("w4a4", "w4a3", "w3a4", "w8a8", "w2a2", "w5a7")

# Both sides use the same codes; they differ by float32 sums: 288 terms for the convolution, 16 for the linear layer.
TOLERANCE = 1e-5


def quantised(captured: Callable[[str], Program], model: str, bits: str) -> Program:
    """Up to fake quantisation with a LoRA, its tables and LoRAs filled with fixed random values."""
    program = run_pipeline(
        captured(model), [SelectLayers(bits=bits), InsertHadamard(), InsertQdq(GRID), AttachLora(rank=3)]
    )
    generator, state = torch.Generator().manual_seed(1), dict(program.state)
    top = 2 ** (int(bits[3]) - 1) - 1
    for name, tensor in state.items():
        if name.endswith("scale_table"):
            state[name] = (1.5 + torch.rand(tensor.shape, generator=generator)) / top
        if name.endswith("lora_b"):
            state[name] = 0.05 * torch.randn(tensor.shape, generator=generator)
    return program.evolve(state=state)


def integer(program: Program) -> Program:
    return run_pipeline(program, [MergeLora(), FreezeIntegers(), RotateWeights(), SplitDigits(), PackInt4()])


# ---- the oracle ----------------------------------------------------------------------------------------------------


def signs(order: int) -> np.ndarray:
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)], dtype=np.int64)


def rotate(x: np.ndarray, block: int) -> np.ndarray:
    """H (±1, unnormalised) over axis 1 of x [N, C, …], block by block."""
    n, c = x.shape[:2]
    return np.einsum("ij,ngjk->ngik", signs(block).astype(x.dtype), x.reshape(n, c // block, block, -1)).reshape(
        x.shape
    )


def codes(x: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    inverse = (np.float32(1) / scale).reshape(-1, *[1] * (x.ndim - 1))
    return np.clip(np.rint(x.astype(np.float32) * inverse), low, high).astype(np.int64)


def merged_weight(state: Mapping[str, torch.Tensor], site: str) -> np.ndarray:
    weight = state[f"{site}.weight"]
    return (weight + (state[f"{site}.lora_b"] @ state[f"{site}.lora_a"]).view(weight.shape)).numpy()


def conv_by_definition(q: np.ndarray, w: np.ndarray) -> np.ndarray:
    """3×3, stride 1, padding 1, in int64."""
    n, _, height, width = q.shape
    out = np.zeros((n, w.shape[0], height, width), dtype=np.int64)
    padded = np.pad(q, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for y in range(height):
        for x in range(width):
            patch = padded[:, :, y : y + 3, x : x + 3]
            out[:, :, y, x] = np.einsum("nchw,ochw->no", patch, w)
    return out


def oracle_site(program: Program, site: str, x: np.ndarray, rows: list[int], *, is_conv: bool) -> np.ndarray:
    """One site in integers: codes of Ĥ·x, codes of W times H, int64 product, one real factor at the end."""
    plan, state = program.plan[site], program.state
    top_a, top_w = 2 ** (plan.activation_bits - 1) - 1, 2 ** (plan.weight_bits - 1) - 1
    scale_a = state[f"{site}.activation_scale_table"].numpy()[rows]
    scale_w = state[f"{site}.weight_scale"].numpy()
    bias = state[f"{site}.bias"].numpy().astype(np.float64)
    channels_first = x if is_conv else np.swapaxes(x, 1, 2)
    rotated = rotate(channels_first.astype(np.float32), plan.block) * np.float32(plan.block**-0.5)
    q = codes(rotated, scale_a, -top_a, top_a)
    w = codes(merged_weight(state, site), scale_w, -top_w - 1, top_w)
    w = rotate(w, plan.block)  # int64: exact
    accumulators = conv_by_definition(q, w) if is_conv else np.einsum("nck,oc->nok", q, w)
    real = accumulators * (scale_w / np.sqrt(plan.block)).astype(np.float64).reshape(1, -1, *[1] * (x.ndim - 2))
    real = real * scale_a.astype(np.float64).reshape(-1, *[1] * (x.ndim - 1)) + bias.reshape(1, -1, *[1] * (x.ndim - 2))
    return real if is_conv else np.swapaxes(real, 1, 2)


def oracle_two_sites(program: Program, sample: torch.Tensor, timestep: torch.Tensor) -> np.ndarray:
    rows = [int(np.abs(np.float32(t) - np.float32(GRID)).argmin()) for t in timestep.tolist()]
    shifted = sample.numpy() + (timestep.numpy() / np.float32(1000)).reshape(-1, 1, 1, 1)
    hidden = oracle_site(program, "conv", shifted, rows, is_conv=True).astype(np.float32)
    hidden = hidden / (1 + np.exp(-hidden))
    tokens = np.swapaxes(hidden.reshape(*hidden.shape[:2], -1), 1, 2)
    return oracle_site(program, "head", tokens, rows, is_conv=False)


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_integer_equals_fake_quantised_equals_numpy(bits: str, captured: Callable[[str], Program]) -> None:
    program = quantised(captured, "two_sites", bits)
    kept = fingerprint(program)
    lowered = integer(program)
    assert fingerprint(program) == kept
    args = program.example_inputs(5, seed=3)
    with torch.no_grad():
        fake, whole, exact = program.module()(*args), lowered.module()(*args), captured("two_sites").module()(*args)
    oracle = oracle_two_sites(program, *args)
    norm = np.linalg.norm(oracle)
    assert np.linalg.norm(whole.numpy() - oracle) <= TOLERANCE * norm
    assert np.linalg.norm(fake.numpy() - oracle) <= TOLERANCE * norm
    # It is quantised: the float model is further away than rounding, and further at fewer bits.
    assert np.linalg.norm(exact.numpy() - oracle) > {"w8a8": 1e-3, "w5a7": 1e-3}.get(bits, 1e-2) * norm


def test_fewer_bits_are_further_from_the_float_model(captured: Callable[[str], Program]) -> None:
    errors = []
    for bits in ("w8a8", "w5a7", "w4a4", "w2a2"):
        program = captured("two_sites")
        chain = [SelectLayers(bits=bits), InsertHadamard(), InsertQdq((500.0,))]
        q = run_pipeline(program, chain)
        args = program.example_inputs(4)
        top = 2 ** (int(bits[3]) - 1) - 1
        state = {k: torch.full_like(v, 4.5 / top) if k.endswith("scale_table") else v for k, v in q.state.items()}
        with torch.no_grad():
            wanted = program.module()(*args)
            errors.append(float((q.evolve(state=state).module()(*args) - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.1 < errors[-1]


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
@pytest.mark.parametrize("model", ["geometry", "shared_weights", "tied_time_embedding", "odd_channels"])
def test_integer_equals_fake_quantised(model: str, bits: str, captured: Callable[[str], Program]) -> None:
    program = quantised(captured, model, bits)
    lowered = integer(program)
    args = program.example_inputs(3)
    with torch.no_grad():
        fake, whole = program.module()(*args), lowered.module()(*args)
    assert (fake - whole).norm() <= TOLERANCE * fake.norm()


@pytest.mark.parametrize("stage", ["quantised", "integer"])
@pytest.mark.parametrize("model", ["two_sites", "shared_weights"])
def test_a_mixed_batch_equals_one_by_one(model: str, stage: str, captured: Callable[[str], Program]) -> None:
    program = quantised(captured, model, "w4a4")
    program = program if stage == "quantised" else integer(program)
    sample, _ = program.example_inputs(4)
    timestep = torch.tensor([0.0, 310.0, 899.0, 450.0])  # rows 0, 1, 3 and a tie between 1 and 2
    module = program.module()
    with torch.no_grad():
        mixed = module(sample, timestep)
        single = torch.cat([module(sample[i : i + 1], timestep[i : i + 1]) for i in range(4)])
        same = module(sample, torch.zeros(4))
    assert (mixed - single).norm() <= 1e-6 * single.norm()  # batched and single float32 sums
    assert (mixed[1:] - same[1:]).norm() > 1e-2 * same.norm(), "the timestep is ignored"


def test_the_order_of_calls_does_not_matter(captured: Callable[[str], Program]) -> None:
    module = integer(quantised(captured, "two_sites", "w4a4")).module()
    sample = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    times = [900.0, 0.0, 300.0, 300.0, 601.0]
    with torch.no_grad():
        forwards = {t: module(sample, torch.tensor([t])) for t in times}
        backwards = {t: module(sample, torch.tensor([t])) for t in reversed(times)}
    assert all(torch.equal(forwards[t], backwards[t]) for t in times)


def test_two_digits_occur_and_are_exact(captured: Callable[[str], Program]) -> None:
    frozen = run_pipeline(quantised(captured, "two_sites", "w8a8"), [MergeLora(), FreezeIntegers(), RotateWeights()])
    split = run_pipeline(frozen, [SplitDigits()])
    assert split.history[-1].touched == ("conv", "head")
    args = frozen.example_inputs(3)
    with torch.no_grad():
        assert torch.equal(frozen.module()(*args), split.module()(*args))


def test_one_digit_is_reported_with_its_peak(captured: Callable[[str], Program]) -> None:
    frozen = run_pipeline(quantised(captured, "two_sites", "w2a2"), [MergeLora(), FreezeIntegers(), RotateWeights()])
    peak = np.abs(rotate(frozen.state["conv.weight_codes"].numpy().astype(np.int64), 32)).max()
    assert dict(SplitDigits().find(frozen).misses)["conv"] == f"one digit is enough: codes reach {peak} of 127"


def test_packing_stores_two_codes_a_byte(captured: Callable[[str], Program]) -> None:
    lowered = integer(quantised(captured, "two_sites", "w4a4"))
    assert lowered.state["conv.weight_packed"].dtype == torch.uint8
    assert lowered.state["conv.weight_packed"].numel() == 16 * 32 * 9 // 2
    assert "conv.weight_codes" not in lowered.state
    assert not [name for name in lowered.state if name.endswith((".weight", "lora_a", "lora_b", "weight_merged"))]


@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-8, 7), (-128, 127)])
def test_the_weight_scale_is_the_best_of_its_candidates(low: int, high: int) -> None:
    weight = (
        torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 1, 10, 0])[:, None, None]
    )
    found = mse_weight_scale(weight, low, high)
    assert found[3] == 1
    for row in range(3):
        flat = weight[row].numpy().ravel().astype(np.float64)
        ratios = np.linspace(0.2, 1.2, 81)[1:]
        scales = np.abs(flat).max() / high * ratios
        errors = [np.sum((flat - s * np.clip(np.rint(flat / s), low, high)) ** 2) for s in scales]
        best = scales[int(np.argmin(errors))]
        assert float(found[row]) == pytest.approx(best, rel=1e-5)  # the same candidate, in float32


@pytest.mark.parametrize(("largest", "limit"), [(1, 127), (7, 127), (63, 127), (64, 127), (65, 64), (127, 64)])
def test_one_digit_cannot_saturate_two_products_in_int16(largest: int, limit: int) -> None:
    # x86 without VNNI adds two u8×s8 products in int16. Codes within ±q are stored as 1…2·q + 1.
    assert digit_limit(largest) == limit
    unsigned_top = 2 * largest + 1
    assert 2 * unsigned_top * limit <= 2**15 - 1
    assert limit == 127 or 2 * unsigned_top * 127 > 2**15 - 1


def test_eight_bit_activations_split_at_64(captured: Callable[[str], Program]) -> None:
    chain = [MergeLora(), FreezeIntegers(), RotateWeights()]
    found = {}
    for bits in ("w4a7", "w4a8"):
        frozen = run_pipeline(quantised(captured, "odd_channels", bits), chain)
        # Equal codes add up over their block: 8·8 = 64 just fits, 16·5 = 80 does not.
        state = dict(frozen.state)
        state["eight.weight_codes"] = torch.full_like(state["eight.weight_codes"], -8)
        state["sixteen.weight_codes"] = torch.full_like(state["sixteen.weight_codes"], -5)
        found[bits] = SplitDigits().find(frozen.evolve(state=state))
    assert {"eight", "sixteen"} <= dict(found["w4a7"].misses).keys()
    assert dict(found["w4a8"].misses)["eight"] == "one digit is enough: codes reach 64 of 64"
    assert "sixteen" in found["w4a8"].matches
