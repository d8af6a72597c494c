"""As much of Triton's model_config.proto as is written, with its numbers and types, for protobuf's own parser."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

STRING, INT32, INT64, UINT64, ENUM, MESSAGE = 9, 5, 3, 4, 14, 11
ONE, MANY = 1, 3
DTYPES: tuple[str, ...] = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
DTYPES += ("FP16", "FP32", "FP64", "STRING", "BF16")
KINDS = {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3}

# Message -> (name, number, type, label, type's name)
MESSAGES: dict[str, list[tuple[str, int, int, int, str]]] = {
    "ModelTensorReshape": [("shape", 1, INT64, MANY, "")],
    "ModelInput": [
        ("name", 1, STRING, ONE, ""),
        ("data_type", 2, ENUM, ONE, "DataType"),
        ("dims", 4, INT64, MANY, ""),
        ("reshape", 5, MESSAGE, ONE, "ModelTensorReshape"),
    ],
    "ModelOutput": [
        ("name", 1, STRING, ONE, ""),
        ("data_type", 2, ENUM, ONE, "DataType"),
        ("dims", 3, INT64, MANY, ""),
        ("reshape", 5, MESSAGE, ONE, "ModelTensorReshape"),
    ],
    "ModelInstanceGroup": [
        ("count", 2, INT32, ONE, ""),
        ("kind", 4, ENUM, ONE, "ModelInstanceGroup.Kind"),
    ],
    "ModelDynamicBatching": [
        ("preferred_batch_size", 1, INT32, MANY, ""),
        ("max_queue_delay_microseconds", 2, UINT64, ONE, ""),
    ],
    "ModelConfig": [
        ("name", 1, STRING, ONE, ""),
        ("platform", 2, STRING, ONE, ""),
        ("max_batch_size", 4, INT32, ONE, ""),
        ("input", 5, MESSAGE, MANY, "ModelInput"),
        ("output", 6, MESSAGE, MANY, "ModelOutput"),
        ("instance_group", 7, MESSAGE, MANY, "ModelInstanceGroup"),
        ("cc_model_filenames", 9, MESSAGE, MANY, "ModelConfig.CcModelFilenamesEntry"),
        ("dynamic_batching", 11, MESSAGE, ONE, "ModelDynamicBatching"),
        ("backend", 17, STRING, ONE, ""),
    ],
}


def _enum(into: Any, name: str, values: dict[str, int]) -> None:
    enum = into.enum_type.add(name=name)
    for value, number in values.items():
        enum.value.add(name=value, number=number)


def _model_config() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    _enum(file, "DataType", {f"TYPE_{name}": number for number, name in enumerate(DTYPES)})
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            typed = {"type_name": f".inference.{of}"} if of else {}
            message.field.add(name=field, number=number, type=kind, label=label, **typed)
        if name == "ModelInstanceGroup":
            _enum(message, "Kind", KINDS)
        if name == "ModelConfig":
            entry = message.nested_type.add(name="CcModelFilenamesEntry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=STRING, label=ONE)
            entry.field.add(name="value", number=2, type=STRING, label=ONE)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


MODEL_CONFIG = _model_config()
DATA_TYPES = {number: f"TYPE_{name}" for number, name in enumerate(DTYPES)}
