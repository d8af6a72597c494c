"""A tile changes how long a product takes, and no bit of it: in every form, with its epilogue, in parts."""

from collections.abc import Callable

import pytest
import torch
from kernel_oracle import fenced
from product_cases import Form, layer, random_codes
from torch import Tensor

from hqc.kernels import Epilogue, int_conv2d, int_gemm
from hqc.kernels.cards import card_of
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import fits
from hqc.kernels.tuned import Table, Timed
from hqc.kernels.tuning import force, use

TILES = [
    ProductTile(128, 128, 64, 4, 4),
    ProductTile(64, 128, 64, 4, 3),
    ProductTile(256, 64, 64, 8, 4),
    ProductTile(64, 64, 32, 4, 2, 3),
    ProductTile(16, 32, 64, 4, 4, 2),
    ProductTile(32, 32, 32, 4, 4, 4),
]
# The form is the sums' matter and the type the epilogue's: each form once, each type at least once.
FORMS = [(Form("int8"), torch.float16), (Form("packed", 32), torch.float32), (Form("digits"), torch.float16)]


def same_in_every_tile(product: Product, run: Callable[[], Tensor]) -> None:
    """Forced; from a table too, of which the first will do."""
    usual = run()
    tried = 0
    for tile in TILES:
        if not fits(product, tile, card_of(usual.device)):
            continue
        with force(tile):
            assert torch.equal(run().view(torch.uint8), usual.view(torch.uint8)), tile
        if not tried:
            with use(Table(card_of(usual.device), {product: (Timed(1.0, tile),)})):
                assert torch.equal(run().view(torch.uint8), usual.view(torch.uint8)), tile
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
def test_a_linear_layer(form: Form, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, _ = layer(form, (40, 320), generator, device)
    codes = fenced(random_codes((2, 33, 320), 7, generator), 77, device)
    scale = fenced(torch.tensor([1e-4, 3e-5]) / (100 if form.name == "digits" else 1), float("nan"), device)
    bias = torch.randn(40, generator=generator).to(device)
    residual = torch.randn(2, 33, 40, generator=generator).to(device, dtype)
    product = Product(66, 40, 320, 1, form.block, form.name == "digits")
    same_in_every_tile(product, lambda: int_gemm(codes, weight, scale, Epilogue(bias, residual, True, dtype)))


@pytest.mark.parametrize("form", [Form("int8"), Form("packed", 32)], ids=str)
def test_a_convolution(form: Form, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, _ = layer(form, (24, 3, 3, 96), generator, device)
    codes = fenced(random_codes((2, 5, 4, 96), 7, generator), 77, device)
    scale = torch.tensor([1e-3, 2e-3], device=device)
    bias = torch.randn(24, generator=generator).to(device)
    product = Product(40, 24, 96, 9, form.block)
    same_in_every_tile(product, lambda: int_conv2d(codes, weight, scale, Epilogue(bias), padding=(1, 1)))
