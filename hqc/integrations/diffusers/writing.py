"""`export_diffusers`: a quantised Program as a folder that diffusers' own `from_pretrained` loads.

NAME/config.json                             the denoiser's, with a `quantization_config`
NAME/diffusion_pytorch_model.safetensors     codes and scales of quantised layers, everything else as it was
NAME/plan.json                               the quantisation plan
NAME/manifest.json                           kind hqc-diffusers: sha256 and size of every file

The modules of the denoiser stay where they are, so that only what was rewritten layer by layer can be written: a step
that changed the graph between layers is refused by its name.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from hqc.atomic import atomic_folder
from hqc.capture.diffusers_models import Denoiser
from hqc.capture.families import FAMILIES
from hqc.capture.fit import empty_module
from hqc.errors import ExportError
from hqc.export.files import CONFIG_FILE
from hqc.export.reference import verification_inputs
from hqc.export.verification import NetworkCheck, check_network, network_problems
from hqc.integrations.diffusers.config import HqcConfig, SiteForm
from hqc.integrations.diffusers.modules import HqcLayer
from hqc.integrations.diffusers.quantizer import GRID
from hqc.manifests import write_manifest
from hqc.passes import PASSES
from hqc.paths import StrPath
from hqc.program import Program, Stage, is_op
from hqc.quiet import quiet_libraries
from hqc.runtimes.integer.forms import integer_form, site_rotation
from hqc.runtimes.integer.weights import site_weight, weight_form
from hqc.sites import QuantisedSite, quantised_sites
from hqc.stages import doing

__all__ = ["DIFFUSERS_KIND", "DiffusersReport", "export_diffusers"]

DIFFUSERS_KIND = "hqc-diffusers"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
_BY_LAYER = frozenset(
    {
        *("merge_style", "select_layers", "insert_hadamard", "insert_qdq", "finetune_only", "attach_lora"),
        *("merge_lora", "freeze_integers", "rotate_weights", "split_digits", "pack_int4"),
    }
)
"""Passes that leave what lies between the layers as it was."""
_WHERE = "target diffusers"
_DO = "Use `hqc.load(program).as_denoiser()` in the pipeline, or an export."


@dataclass(frozen=True)
class DiffusersReport:
    """What was written, and how far the loaded denoiser is from the program."""

    folder: Path
    kind: str
    sites: int
    size_bytes: int
    seconds: float
    network: NetworkCheck

    def __str__(self) -> str:
        net = self.network
        return (
            f"{self.folder}: {self.kind}, {self.sites} integer layers, {self.size_bytes / 1e6:.1f} MB, "
            f"{self.seconds:.1f} s\nnetwork  with equal codes {net.forced_error:.1e}; free-running "
            f"{net.free_error:.1e}, {net.flipped} codes flipped at a rounding boundary"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {**asdict(self), "folder": str(self.folder)}


def export_diffusers(
    program: Program, folder: StrPath, *, force: bool = False, float_program: Program | None = None
) -> DiffusersReport:
    """Writes a quantised program as a model of diffusers, loads it, and holds it against the program.

    Args:
        program: of a denoiser of diffusers, quantised or trained.
        folder: written whole or not at all.
        force: replace an artefact that exists.
        float_program: the captured program, the measure of the quantisation error.

    Raises:
        ExportError: if the program was rewritten between layers, or what was written is out of bounds.
        ArtefactError: if the folder exists or cannot be written.
    """
    start, folder = time.perf_counter(), Path(folder)
    kind = _require_layers(program)
    integer = integer_form(program)
    with quiet_libraries():
        module: Any = empty_module(kind, program.origin.unet_config)
    tensors, config = _written(integer, module)
    own = {key: value for key, value in program.origin.unet_config.items() if key in module.config or key[0] == "_"}
    whole = {**own, "quantization_config": config.to_dict()}
    with atomic_folder(folder, force=force) as temporary:
        with doing("writing for diffusers"):
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            (temporary / CONFIG_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            (temporary / "plan.json").write_text(json.dumps(program.plan.to_dict(), indent=1) + "\n", encoding="utf-8")
        with doing("verifying what was written"):
            network = _verified(temporary, kind, program, float_program)
        size = (temporary / WEIGHTS_FILE).stat().st_size
        write_manifest(temporary, DIFFUSERS_KIND, _fields(program, network))
    seconds = round(time.perf_counter() - start, 3)
    return DiffusersReport(folder, kind, len(config.sites), size, seconds, network)


def _require_layers(program: Program) -> str:
    """The class of a program whose layers can be replaced one by one.

    Raises:
        ExportError: naming the step that is in the way.
    """
    kind = str(program.origin.unet_config.get("_class_name", ""))
    if kind not in FAMILIES or not program.has_timestep:
        raise ExportError(_WHERE, f"takes a denoiser of diffusers; the program is {kind or 'none'}", _DO)
    if program.stage == Stage.CAPTURED:
        raise ExportError(_WHERE, "the program is captured, and has nothing quantised", "Quantise it first.")
    for record in program.history:
        name = record.text.partition("(")[0]
        if name in PASSES and name not in _BY_LAYER and (record.touched or record.removed):
            raise ExportError(_WHERE, f"{name} rewrote the graph between layers, at {record.touched[0]}", _DO)
    for plan in program.plan.sites:
        if plan.quantised and (not plan.site.replace(".", "").replace("_", "").isalnum()):
            raise ExportError(_WHERE, f"site {plan.site} is a part of a layer, or a second call of it", _DO)
        if plan.weight_residual:
            raise ExportError(_WHERE, f"insert_qdq gave {plan.site} binary codes, a second product", _DO)
    return kind


def _written(integer: Program, module: nn.Module) -> tuple[dict[str, Tensor], HqcConfig]:
    """Every tensor of the file, and the configuration that says what they are."""
    grid = _grid(integer)
    forms, own = {}, {f"{GRID}.grid": grid}
    for site in quantised_sites(integer):
        form, tensors = _layer(integer, site, len(grid))
        forms[site.site] = asdict(form)
        own |= {f"{site.site}.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    replaced = {f"{name}.{part}" for name in forms for part in ("weight", "bias")}
    others = [name for name in module.state_dict() if name not in replaced]
    if missing := [name for name in others if name not in integer.state]:
        raise ExportError(_WHERE, f"the program has no {missing[0]}, which no call reads", _DO)
    floats = {name: integer.state[name].detach().clone() for name in others}
    return {**floats, **own}, HqcConfig(forms, len(grid))


def _grid(integer: Program) -> Tensor:
    """The timesteps of the tables' rows: all sites look theirs up in one."""
    nodes = [n for n in integer.graph.nodes if is_op(n, torch.ops.hqc.nearest_timestep.default)]
    names = {str(node.args[1].target) for node in nodes if isinstance(node.args[1], fx.Node)}
    if len(names) != 1:
        raise ExportError(_WHERE, f"expected one grid of timesteps, found {len(names)}", "Use insert_qdq's tables.")
    return integer.state[names.pop()].detach().to(torch.float32).clone()


def _layer(integer: Program, site: QuantisedSite, rows: int) -> tuple[SiteForm, dict[str, Tensor]]:
    """How a layer is computed, and its tensors."""
    weight, rotation = site_weight(integer, site, device=torch.device("cpu")), site_rotation(site)
    looked_up, bias = site.bounds.lookups, site.layer.args[3]
    table: Any = site.quantiser.args[1].args[0]  # type: ignore[union-attr]
    tensors = {
        "weight_codes": weight.codes,
        "weight_scale": weight.scale.to(torch.float32),
        "activation_scale": integer.state[str(table.target)].to(torch.float32).expand(rows),
    }
    if weight.high is not None:
        tensors["weight_high"] = weight.high
    if isinstance(bias, fx.Node):
        tensors["bias"] = integer.state[str(bias.target)].to(torch.float32)
    if looked_up is not None:
        tensors |= {"activation_low": looked_up.lows.expand(rows), "activation_high": looked_up.highs.expand(rows)}
    form: Any = weight_form(weight)
    low, high = (site.bounds.low, site.bounds.high) if looked_up is None else (None, None)
    regular = rotation.regular or weight.regular
    return SiteForm(form, rotation.block, regular, weight.rotation, low, high), tensors


@torch.no_grad()
def _verified(folder: Path, kind: str, program: Program, float_program: Program | None) -> NetworkCheck:
    """Loads the folder as anyone does, and holds output and codes against the program.

    Raises:
        ExportError: naming everything that is out of bounds.
    """
    import diffusers

    with quiet_libraries():
        loaded = getattr(diffusers, kind).from_pretrained(folder, use_safetensors=True, local_files_only=True)
    args, codes = verification_inputs(program, 4), dict[str, Tensor]()
    for name, layer in loaded.named_modules():
        if isinstance(layer, HqcLayer):
            layer.register_forward_pre_hook(_noting(name, codes))
    output = Denoiser(loaded, [spec.name for spec in program.inputs])(*args)
    network = check_network(output, output, codes, program, float_program, args)
    if problems := network_problems(network, program, 0.0):
        found = "; ".join(problems[:5])
        raise ExportError("export verification", found, "Nothing was written. Report a bug.", lists=True)
    return network


def _noting(name: str, codes: dict[str, Tensor]) -> Any:
    def note(layer: Any, arguments: tuple[Tensor, ...]) -> None:
        codes[name] = layer.codes_of(arguments[0])

    return note


def _fields(program: Program, network: NetworkCheck) -> Mapping[str, Any]:
    return {
        "stage": str(program.stage),
        "origin": asdict(program.origin),
        "inputs": [asdict(spec) for spec in program.inputs],
        "network": asdict(network),
    }
