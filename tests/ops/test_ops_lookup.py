"""Weights of tables: numpy's indexing, and the codes and tables that a weight of few values has."""

import numpy as np
import pytest
import torch

from hqc.ops import lookup, pack_int4, table_codes, unpack_int4


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 2)])
def test_every_code_picks_its_rows_entry(bits: int, shape: tuple[int, ...]) -> None:
    generator, half = torch.Generator().manual_seed(bits), 2 ** (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    table = torch.randn(shape[0], 2 * half, generator=generator)
    found = lookup(codes, table).numpy()
    for place in np.ndindex(*shape):
        assert found[place] == table[place[0], int(codes[place]) + half]


@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3)])
def test_codes_and_table_give_the_very_weight(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape[0], 8, generator=generator)
    values[0, 3:] = values[0, 2]  # a row of three values
    weight = values.gather(1, torch.randint(0, 8, (shape[0], 1000), generator=generator))[:, : np.prod(shape[1:])]
    weight = weight.reshape(shape)
    codes, table = table_codes(weight, 8)
    assert torch.equal(lookup(codes, table), weight)
    assert bool((table[:, 1:] >= table[:, :-1]).all())
    assert (int(codes.min()), int(codes.max())) == (-4, 3)
    assert torch.equal(unpack_int4(pack_int4(codes), list(shape)), codes)


def test_more_values_than_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 5 different values; expected at most 4"):
        table_codes(torch.stack([torch.zeros(5), torch.arange(5.0)]), 4)


def test_a_code_past_the_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        lookup(torch.tensor([[9]], dtype=torch.int8), torch.zeros(1, 16))
