"""`HqcConfig`: the `quantization_config` of a denoiser's config.json: how many rows the tables have, and every site."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal, get_args

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from hqc.errors import ArtefactError

__all__ = ["METHOD", "Form", "HqcConfig", "Method", "SiteForm"]

METHOD = "hqc"
Form = Literal["int4", "int8", "two digits"]
_LARGEST_BLOCK, _MOST_ROWS = 256, 100_000


class Method(str, Enum):  # noqa: UP042  (diffusers compares with text and reads .value)
    """diffusers wants a member of an enumeration, and looks it up as text."""

    HQC = METHOD


@dataclass(frozen=True)
class SiteForm:
    """How a layer is computed.

    form: of its weight. block, regular: the rotation of its input; order 1 for none. rotation: 0, or the order of the
    rotation that a packed weight is still to be multiplied with. low, high: the ends of the activation's codes; None
    where every row of the tables has its own.
    """

    form: Form
    block: int = 1
    regular: bool = False
    rotation: int = 1
    low: int | None = None
    high: int | None = None

    @staticmethod
    def from_dict(site: str, data: Any) -> "SiteForm":
        """Reads what `dataclasses.asdict` gives.

        Raises:
            ArtefactError: if it is no form that hqc writes.
        """
        try:
            found = SiteForm(**data)
        except TypeError as error:
            raise _damaged(site, f"has other fields ({error})") from error
        if found.form not in get_args(Form) or type(found.regular) is not bool:
            raise _damaged(site, f"has the form {str(found.form)[:30]!r}")
        if not all(_is_order(order, found.regular) for order in (found.block, found.rotation)):
            raise _damaged(site, "has a rotation of no order")
        if found.rotation > 1 and found.form != "int4":
            raise _damaged(site, "rotates a weight that is not packed")
        ends = (found.low, found.high)
        if ends != (None, None) and not (
            all(type(end) is int for end in ends) and -128 <= ends[0] < ends[1] <= 127  # type: ignore[operator]
        ):
            raise _damaged(site, "has activation codes outside -128…127")
        return found


class HqcConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What diffusers hands to `HqcQuantizer`."""

    def __init__(self, sites: Any = None, rows: Any = 1, **others: Any) -> None:
        """sites: name of a module -> its form. rows: of the tables, one a timestep.

        Raises:
            ArtefactError: if they are nothing that hqc writes.
        """
        self.quant_method = Method.HQC
        if others or not isinstance(sites, Mapping) or not sites or not all(isinstance(name, str) for name in sites):
            found = f"has {', '.join(sorted(map(str, others)))[:60]}" if others else "names no sites"
            raise ArtefactError("quantization_config", found, "Export it again with hqc.")
        if type(rows) is not int or not 0 < rows <= _MOST_ROWS:
            raise ArtefactError("quantization_config", "has no number of rows", "Export it again with hqc.")
        self.rows = rows
        self.sites = {name: SiteForm.from_dict(name, form) for name, form in sites.items()}

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers calls it, with the method among the fields."""
        config = cls(**{name: value for name, value in dict(config_dict).items() if name != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "quant_method": METHOD,
            "rows": self.rows,
            "sites": {name: asdict(form) for name, form in self.sites.items()},
        }

    def __repr__(self) -> str:
        return f"HqcConfig({len(self.sites)} sites, {self.rows} rows)"


def _is_order(order: Any, regular: bool) -> bool:
    if type(order) is not int or not 1 <= order <= _LARGEST_BLOCK or order & (order - 1):
        return False
    return order == 1 or not regular or order >= 4


def _damaged(site: str, found: str) -> ArtefactError:
    return ArtefactError(f"quantization_config, site {site[:80]}", found, "Export it again with hqc.")
