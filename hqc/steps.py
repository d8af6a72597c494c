"""Steps and their parts as text and as data: frozen dataclasses whose fields are their options.

    insert_hadamard(block=64), distil(losses=(guided_noise(),), epochs=10)         text
    [{"insert_hadamard": {"block": 64}}, {"distil": {"losses": [{"guided_noise": {}}], "epochs": 10}}]     data

Both are read with the types and bounds that the fields declare; nothing in them is executed. Options that have their
defaults are left out. A part is what an option of a step holds: a loss, a group of parameters.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from hqc.errors import PipelineTextError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "Within",
    "built",
    "check_options",
    "flat_options",
    "from_data",
    "parse_steps",
    "schema_of",
    "step_data",
    "step_name",
    "step_text",
    "typed_option",
    "value_from",
    "value_text",
]

Known = Mapping[str, type]
_SHAPE = "Write steps as name(option=value), separated by commas."


@dataclass(frozen=True)
class Within:
    """Bounds of a number, for `Annotated`: pydantic's `Field` without pydantic, which passes do not need to run.

    gt, ge, le: greater than, at least, at most; None for no bound.
    """

    gt: float | None = None
    ge: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Where pydantic reads them from."""
        bounds = {"gt": self.gt, "ge": self.ge, "le": self.le}
        return {**handler(source), **{name: bound for name, bound in bounds.items() if bound is not None}}


def step_name(kind: type) -> str:
    """InsertHadamard -> insert_hadamard."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def options_of(step: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the options that differ from their defaults."""
    for field in fields(step):
        value = getattr(step, field.name)
        if field.repr and value != _default(field):
            yield field.name, value


# ---- writing ---------------------------------------------------------------------------------------------------------


def step_text(step: Any) -> str:
    """The step as text: its name and the options that differ from their defaults."""
    return f"{step_name(type(step))}({', '.join(f'{name}={value_text(value)}' for name, value in options_of(step))})"


def value_text(value: Any) -> str:
    """The value of an option as text."""
    if is_dataclass(value):
        return step_text(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def step_data(step: Any) -> dict[str, dict[str, Any]]:
    """The step as plain data, for YAML and JSON."""
    return {step_name(type(step)): {name: _value_data(value) for name, value in options_of(step)}}


def _value_data(value: Any) -> Any:
    if is_dataclass(value):
        return step_data(value)
    return [_value_data(one) for one in value] if isinstance(value, tuple) else value


def flat_options(steps: Sequence[Any]) -> dict[str, Any]:
    """Every option that decides a result by its path, `distil.seed` or `distil[2].seed` for a second one: for messages.

    Options that do not decide it are fields without comparison.
    """
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for step in steps:
        name = step_name(type(step))
        counts[name] = counts.get(name, 0) + 1
        place = name if counts[name] == 1 else f"{name}[{counts[name]}]"
        found[place] = True
        for field in fields(step):
            if field.compare:
                value = _value_data(getattr(step, field.name))
                found[f"{place}.{field.name}"] = value
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse_steps(text: str, known: Known, parts: Known | None = None) -> tuple[Any, ...]:
    """Reads `insert_hadamard(block=32), insert_qdq()`: known names, literal keyword options, nothing is executed.

    Raises:
        PipelineTextError: for anything else, with the place.
    """
    try:
        tree = ast.parse(f"[{text}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PipelineTextError(f"pipeline {text[:80]!r}", f"cannot be parsed ({error})", _SHAPE) from error
    if not isinstance(tree, ast.List):
        raise PipelineTextError(f"pipeline {text[:80]!r}", "is not a list of steps", _SHAPE)
    return tuple(_parse_call(call, known, parts or {}) for call in tree.elts)


def _parse_call(call: ast.expr, known: Known, parts: Known) -> Any:
    where = f"pipeline item {_unparse(call)!r}"
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise PipelineTextError(where, "is not name(option=value)", _SHAPE)
    kind = _kind(where, call.func.id, known)
    options: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg in options:
            raise PipelineTextError(where, f"gives option {keyword.arg} twice", "Give it once.")
        _require_option(where, keyword.arg, kind)
        options[str(keyword.arg)] = _literal(where, str(keyword.arg), keyword.value, parts)
    return built(where, kind, options)


def _unparse(call: ast.expr) -> str:
    try:
        return ast.unparse(call)[:80]
    except RecursionError:
        return "…"


def _literal(where: str, name: str, value: ast.expr, parts: Known) -> Any:
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in parts:
        return _parse_call(value, parts, parts)
    if isinstance(value, (ast.Tuple, ast.List)):
        try:
            return tuple(_literal(where, name, one, parts) for one in value.elts)
        except RecursionError as error:
            raise PipelineTextError(where, f"option {name} is not a literal", "Write a value.") from error
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise PipelineTextError(where, f"option {name} is not a literal", "Write a value.") from error


def from_data(data: Any, known: Known, parts: Known, where: str) -> Any:
    """The step that `step_data` wrote; a bare name is one without options.

    Raises:
        PipelineTextError: if it is none, with the place.
    """
    if isinstance(data, str):
        data = {data: {}}
    if not isinstance(data, dict) or len(data) != 1:
        raise PipelineTextError(where, f"{_shown(data)} is not `name: {{option: value}}`", "Write one name an item.")
    ((name, options),) = data.items()
    kind = _kind(where, name, known)
    where = f"{where}, {name}"
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise PipelineTextError(where, f"its options are {_shown(options)}", "Write them as option: value.")
    return built(where, kind, {k: value_from(v, parts, f"{where}.{k}") for k, v in options.items()})


def value_from(value: Any, parts: Known, where: str) -> Any:
    """The value of an option from plain data: lists are tuples, mappings are parts.

    Raises:
        PipelineTextError: for a part that there is not.
    """
    if isinstance(value, list):
        return tuple(value_from(one, parts, where) for one in value)
    if isinstance(value, dict):
        return from_data(value, parts, parts, where)
    return value


def _kind(where: str, name: Any, known: Known) -> type:
    if name not in known:
        raise PipelineTextError(
            where, f"unknown step {_shown(name)}; there are {', '.join(known)}", "Use one of them.", lists=True
        )
    return known[name]


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _require_option(where: str, name: Any, kind: type) -> None:
    allowed = [f.name for f in fields(kind) if f.init]
    if name not in allowed:
        has = f"it has {', '.join(allowed)}" if allowed else "it has none"
        raise PipelineTextError(where, f"has no option {name!r}; {has}", "Correct it.", lists=True)


def built(where: str, kind: type, options: Mapping[str, Any]) -> Any:
    """The step or part with these options, checked.

    Raises:
        PipelineTextError: for one that it does not have, that it lacks, or that does not fit.
    """
    for option in options:
        _require_option(where, option, kind)
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in options]:
        raise PipelineTextError(where, f"lacks its option {missing[0]}", "Give it.")
    return kind(**{name: typed_option(where, kind, name, value) for name, value in options.items()})


@cache
def _adapters(kind: type) -> "Mapping[str, TypeAdapter[Any]]":
    from pydantic import TypeAdapter  # a machine that only runs programs may lack it

    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind)}


def typed_option(where: str, kind: type, name: str, value: Any) -> Any:
    """The value of an option of the type and within the bounds that its field declares; whole numbers serve as floats.

    Raises:
        PipelineTextError: if it is not.
    """
    from pydantic import ValidationError

    try:
        return _adapters(kind)[name].validate_python(value, strict=True)
    except (ValidationError, RecursionError) as error:
        raise PipelineTextError(where, _problem(kind, name, value, error), _example(kind, name)) from error


def _problem(kind: type, name: str, value: Any, error: Exception) -> str:
    errors = getattr(error, "errors", None)  # pydantic's
    first = errors()[0] if errors is not None else {"type": "type", "loc": (), "msg": str(error)}
    inside = bool(first["loc"])
    if str(first["type"]).endswith("type") and not inside:
        expected = get_type_hints(kind)[name]
        expected = getattr(get_origin(expected) or expected, "__name__", str(expected))
        return f"option {name} is a {type(value).__name__}; expected {expected}"
    return f"option {name} is {_shown(value)}: {str(first['msg'])[:100]}"


def _example(kind: type, name: str) -> str:
    default = next(_default(f) for f in fields(kind) if f.name == name)
    return "Correct it." if default is MISSING else f"Write it as in {name}={value_text(default)}."


def check_options(step: Any) -> None:
    """Checks the options of a step that Python built, for its `__post_init__`.

    Raises:
        PipelineTextError: if one has the wrong type or is out of bounds.
    """
    kind = type(step)
    for field in fields(step):
        value = typed_option(step_name(kind), kind, field.name, getattr(step, field.name))
        object.__setattr__(step, field.name, value)


# ---- the schema ------------------------------------------------------------------------------------------------------


def schema_of(known: Known) -> dict[str, Any]:
    """The JSON schema of a list of steps: one of the known ones each.

    A bare name stands for a step without options.
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class ByName(GenerateJsonSchema):
        """Dataclasses as `name: {options}`, closed."""

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            """The schema of one step or part."""
            inner = super().dataclass_schema(schema)
            inner.pop("title", None)
            inner["additionalProperties"] = False
            name = step_name(schema["cls"])
            return {
                "type": "object",
                "properties": {name: inner},
                "required": [name],
                "additionalProperties": False,
                "description": (schema["cls"].__doc__ or "").strip().splitlines()[0],
            }

    references: list[Any] = []
    definitions: dict[str, Any] = {}
    for kind in known.values():
        found = TypeAdapter(kind).json_schema(schema_generator=ByName, ref_template="#/$defs/{model}")
        definitions |= found.pop("$defs", {})
        definitions[kind.__name__] = found
        references.append({"$ref": f"#/$defs/{kind.__name__}"})
    return {"type": "array", "items": {"oneOf": [*references, {"enum": list(known)}]}, "$defs": definitions}
