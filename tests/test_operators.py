"""The list of operators: what is on it exists and is safe, what exports translate is on it, what is not is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hqc.export.aten_math import MATH
from hqc.export.aten_shapes import SHAPES
from hqc.operators import ADMITTED, RULES, admitted_name

aten = torch.ops.aten


def operator_of(name: str) -> Any:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


@pytest.mark.parametrize("name", sorted(ADMITTED))
def test_what_is_admitted_exists_and_changes_nothing(name: str) -> None:
    found = operator_of(name)
    assert str(found) == name
    assert not found._schema.is_mutable
    seeded = torch.Tag.nondeterministic_seeded in found.tags
    assert not seeded or name in RULES, "draws random numbers"


def test_what_exports_translate_is_admitted() -> None:
    operators = [t for t in (*MATH, *SHAPES) if isinstance(t, torch._ops.OpOverload)]
    # The functional form of an operator in place is what capture leaves.
    missing = [str(t) for t in operators if not admitted_name(t) and not t._schema.is_mutable]
    assert not missing


def test_every_own_operator_has_a_rule() -> None:
    own = {name for name in ADMITTED if name.startswith("hqc.")}
    assert own == {name for name in RULES if name.startswith("hqc.")}


@pytest.mark.parametrize(
    "name",
    [
        *("_reshape_alias", "as_strided", "_unsafe_index.Tensor", "native_group_norm", "embedding_bag"),
        *("max_pool2d_with_indices_backward", "_convert_indices_from_coo_to_csr", "repeat_interleave.Tensor"),
        *("nonzero", "masked_select", "rand", "randn_like", "empty_like", "scatter.src", "index_put"),
        *("from_file", "set_.source_Tensor", "_local_scalar_dense", "view.dtype", "_fft_c2c", "max_unpool2d"),
    ],
)
def test_what_trusts_its_arguments_is_not(name: str) -> None:
    full = f"aten.{name}" if "." in name else f"aten.{name}.default"
    assert operator_of(full)
    assert full not in ADMITTED


X = torch.arange(12.0).view(3, 4)
FAR = torch.tensor([10**12])


@pytest.mark.parametrize("index", [FAR, -FAR, torch.tensor([3]), torch.tensor([-4])], ids=lambda t: str(t.item()))
@pytest.mark.parametrize(
    "look_up",
    [
        lambda i: aten.embedding.default(X, i),
        lambda i: aten.index_select.default(X, 0, i),
        lambda i: aten.gather.default(X, 0, i.view(1, 1)),
        lambda i: aten.index.Tensor(X, [i]),
    ],
    ids=["embedding", "index_select", "gather", "index"],
)
def test_what_looks_up_refuses_an_index_out_of_range(look_up: Callable[[Any], Any], index: torch.Tensor) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        look_up(index)
