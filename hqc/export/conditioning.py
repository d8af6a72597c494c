"""What gives a denoiser its condition, as files that run without torch: text encoders, tokenizers, class embedders.

text_encoder/model.onnx      input_ids [N, T] -> last_hidden_state [N, T, D], pooler_output [N, D]: optimum's names
tokenizer/tokenizer.json     cuts and fills prompts to T tokens, for the library `tokenizers`
class_embedder/model.onnx    class_labels [N] -> encoder_hidden_states [N, 1, D]
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hqc.errors import ExportError
from hqc.export.files import CLASS_LABELS, CONFIG_FILE, ENCODED, HIDDEN_STATES, INPUT_IDS, LAST_HIDDEN_STATE, MODEL_FILE
from hqc.export.model import EXTERNAL_DATA_BYTES, save_model
from hqc.export.ort_session import open_session, run_session
from hqc.export.verification import check_onnx
from hqc.quiet import quiet_libraries
from hqc.wording import first_words

__all__ = ["last_but_one", "write_class_embedder", "write_text_encoder", "write_tokenizer"]

_TEXTS = ("", "a cat", "A Handwritten 7, on paper!", "caffè, 猫 🙂", "word " * 200)
_BOUND = 1e-4
_IR_VERSION = 10  # the oldest that has opset 21


@torch.no_grad()
def write_class_embedder(embedder: Any, folder: Path, opset: int) -> None:
    """hqc's ClassEmbedder: a row of a table a label.

    Raises:
        ExportError: if the file gives other tokens than torch.
    """
    folder.mkdir()
    table = numpy_helper.from_array(embedder.embedding.weight.detach().float().numpy(), "table")
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", CLASS_LABELS], ["row"]),
            helper.make_node("Unsqueeze", ["row", "axis"], [ENCODED]),
        ],
        "class_embedder",
        [helper.make_tensor_value_info(CLASS_LABELS, TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info(ENCODED, TensorProto.FLOAT, ["N", 1, int(embedder.config.dim)])],
        [table, axis],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION)
    onnx.save(model, str(folder / MODEL_FILE))
    _write_config(folder, embedder.config)
    labels = torch.arange(int(embedder.config.num_classes) + 1)
    _compare(folder, CLASS_LABELS, labels, {ENCODED: embedder(labels)})


class _Outputs(nn.Module):
    """A text encoder that returns some of its outputs, by optimum's names."""

    def __init__(self, encoder: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, tuple(names)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Token numbers -> a vector a token, or one of the whole text."""
        hidden = any(name.startswith(HIDDEN_STATES) for name in self.names)
        found = self.encoder(input_ids, return_dict=True, output_hidden_states=hidden)
        return tuple(_output(found, name) for name in self.names)


def _output(found: Any, name: str) -> Tensor:
    output: Tensor = (
        found.hidden_states[int(name.removeprefix(HIDDEN_STATES))]
        if name.startswith(HIDDEN_STATES)
        else getattr(found, name)
    )
    return output


def last_but_one(encoder: Any) -> str:
    """The output with the hidden states that Stable Diffusion XL reads."""
    return f"{HIDDEN_STATES}{int(encoder.config.num_hidden_layers) - 1}"


def write_text_encoder(
    encoder: Any, tokens: Tensor, folder: Path, opset: int, names: Sequence[str] = (LAST_HIDDEN_STATE, "pooler_output")
) -> None:
    """transformers' CLIPTextModel, with a projection or without.

    tokens: some texts, [N, T] with N ≥ 2, which the file is verified on. names: of its outputs, as optimum has them.

    Raises:
        ExportError: if it cannot be written, or gives something else than torch.
    """
    folder.mkdir()
    module = _Outputs(encoder.eval(), names)
    try:
        with quiet_libraries(), _quiet_exporter():
            program = torch.onnx.export(
                module,
                (tokens,),
                input_names=[INPUT_IDS],
                output_names=list(names),
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever an architecture makes torch.onnx raise
        raise ExportError(
            "text encoder", f"torch.onnx cannot write it ({first_words(error)})", "Export the denoiser alone."
        ) from error
    assert program is not None
    save_model(program.model, folder, external_data_bytes=EXTERNAL_DATA_BYTES)
    _write_config(folder, encoder.config.to_dict())
    with torch.no_grad():
        _compare(folder, INPUT_IDS, tokens, dict(zip(names, module(tokens), strict=True)))
        _compare(folder, INPUT_IDS, tokens[:1], dict(zip(names, module(tokens[:1]), strict=True)))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch.onnx warns of its own code, and of packages that it does not need here."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def write_tokenizer(tokenizer: Any, source: Path, folder: Path) -> Tensor:
    """A tokenizer's own files, its vocabulary, and tokenizer.json, which does all by itself; some texts as tokens.

    Raises:
        ExportError: if it has no such form, or that form gives other tokens.
    """
    from tokenizers import Tokenizer

    backend, length = getattr(tokenizer, "backend_tokenizer", None), int(tokenizer.model_max_length)
    if backend is None:
        what = f"a {type(tokenizer).__name__} has no form for the library tokenizers"
        raise ExportError("tokenizer", what, "Export the denoiser alone.")
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".txt"):
            (folder / path.name).write_bytes(path.read_bytes())
    found = Tokenizer.from_str(backend.to_str())
    found.enable_truncation(length)
    found.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    found.save(str(folder / "tokenizer.json"))
    if not (folder / "vocab.json").exists():  # what transformers before 5, and so optimum, reads instead
        found.model.save(str(folder))
    wanted = tokenizer(list(_TEXTS), padding="max_length", max_length=length, truncation=True).input_ids
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if [alone.encode(text).ids for text in _TEXTS] != wanted:
        raise ExportError("tokenizer", "its form for the library tokenizers gives other tokens", "Report a bug.")
    return torch.tensor(wanted)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(dict(config), indent=1, default=str) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _compare(folder: Path, name: str, value: Tensor, wanted: Mapping[str, Tensor]) -> None:
    """Runs a file and compares it with torch.

    Raises:
        ExportError: if it is out of bounds.
    """
    check_onnx(folder / MODEL_FILE)
    session = open_session(folder / MODEL_FILE)
    found = run_session(session, list(wanted), {name: value.numpy()})
    for (output, theirs), ours in zip(wanted.items(), found, strict=True):
        error = float((torch.from_numpy(ours) - theirs).norm() / theirs.norm().clamp_min(1e-30))
        if not error <= _BOUND:  # NaN too
            what = f"{output} differs from torch's by {error:.1e}; at most {_BOUND:.0e}"
            raise ExportError(folder.name, what, "Nothing was written. Report a bug.")
