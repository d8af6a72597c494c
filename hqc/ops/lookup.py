"""`hqc::lookup`: a weight from codes into a table of real numbers for every output channel."""

import torch
from torch import Tensor

__all__ = ["lookup", "table_codes"]


@torch.library.custom_op("hqc::lookup", mutates_args=())
def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """w[o, …] = table[o, c + E/2]; codes c int8 [O, …] in -E/2…E/2-1, table [O, E] of E = 2ⁿ entries.

    Codes have a sign, so that up to four bits of them are packed as any others.  Source: GANQ (arXiv 2501.12956).
    """
    places = codes.flatten(1).to(torch.int64) + table.shape[1] // 2
    return table.gather(1, places).view(codes.shape)


@lookup.register_fake
def _(codes: Tensor, table: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=table.dtype, device=codes.device)


def table_codes(weight: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(codes, table) of a weight [O, …] with at most `entries` different values in a row, each row's in order.

    Raises:
        ValueError: for a row with more.
    """
    flat, half = weight.flatten(1), entries // 2
    codes, table = torch.empty(flat.shape, dtype=torch.int8), torch.empty(len(flat), entries, dtype=flat.dtype)
    for row, values in enumerate(flat):
        found, places = values.unique(return_inverse=True)
        if len(found) > entries:
            raise ValueError(f"row {row} has {len(found)} different values; expected at most {entries}")
        table[row, : len(found)], table[row, len(found) :] = found, found[-1]
        codes[row] = (places - half).to(torch.int8)
    return codes.view(weight.shape), table
