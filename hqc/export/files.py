"""What the files of an export are called. Importing this loads nothing heavy."""

__all__ = [
    "CLASS_LABELS",
    "CONFIG_FILE",
    "DATA_FILE",
    "ENCODED",
    "HIDDEN_STATES",
    "INPUT_IDS",
    "LAST_HIDDEN_STATE",
    "MODEL_FILE",
    "SCHEDULER_FILE",
    "TEXT_EMBEDS",
]

MODEL_FILE, DATA_FILE, CONFIG_FILE = "model.onnx", "model.onnx.data", "config.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
"""Of a pipeline."""

CLASS_LABELS, ENCODED = "class_labels", "encoder_hidden_states"
"""Input and output of a class embedder."""
INPUT_IDS, LAST_HIDDEN_STATE = "input_ids", "last_hidden_state"
"""Input and output of a text encoder, as optimum has them."""
HIDDEN_STATES, TEXT_EMBEDS = "hidden_states.", "text_embeds"
"""Outputs of those of Stable Diffusion XL: the hidden states before layer N have the number N, the projection."""
