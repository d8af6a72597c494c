"""Recipes as YAML files: written, read without executing anything, and their JSON schema.

name: mine
source: my own
sampler: {num_inference_steps: 20}
steps:
  - select_layers: {rules: all}
  - insert_qdq
  - calibrate_weights
  - calibrate_activations: {samples: 8}
"""

from pathlib import Path
from typing import Any

import yaml

from hqc.errors import PipelineTextError, PlanError
from hqc.recipes.known import PARTS, STEPS
from hqc.recipes.recipe import Recipe
from hqc.sampling import Sampler
from hqc.steps import built, from_data, options_of, schema_of, step_data, value_from

__all__ = ["option_value", "read_recipe", "recipe_schema", "recipe_yaml"]

_LARGEST = 1_000_000
_FIELDS = ("name", "source", "doc", "sampler", "steps")


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` takes; options that have their defaults are left out."""
    data: dict[str, Any] = {"name": recipe.name, "source": recipe.source}
    if sampler := dict(options_of(recipe.sampler)):
        data["sampler"] = sampler
    steps = [step_data(step) for step in recipe.steps]
    data["steps"] = [name if not options else {name: options} for step in steps for name, options in step.items()]
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # without stubs
    """YAML without aliases, which make small files large, and without keys that stand there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node that is no alias."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(None, None, "an alias is not taken", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping whose keys differ."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(None, None, f"{key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Plain data from YAML.

    Raises:
        PlanError: if it is none, with the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        raise PlanError(place, f"is no YAML ({error.problem})", "Correct it.") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise PlanError(where, f"is no YAML ({' '.join(str(error).split())[:100]})", "Correct it.") from error


def option_value(text: str, where: str) -> Any:
    """The value of an option that was typed: YAML, with its steps' parts as files write them.

    Raises:
        PlanError, PipelineTextError: if it is none.
    """
    return value_from(read_yaml(text, where), PARTS, where)


def read_yaml_file(path: Path, what: str) -> Any:
    """Plain data from a YAML file. what: it is, a recipe or a plan.

    Raises:
        PlanError: if it cannot be read, is too large, or no YAML.
    """
    where = f"{what} {path}"
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or "no UTF-8 text"
        raise PlanError(where, f"cannot be read ({found})", "Check the path.") from error
    if len(text) > _LARGEST:
        raise PlanError(where, f"is larger than {_LARGEST:,} characters", f"Give a {what} file.")
    return read_yaml(text, where)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file.

    Raises:
        PlanError, PipelineTextError: if it is none: what, where, and what would be.
    """
    return recipe_from_data(read_yaml_file(path, "recipe"), f"recipe {path}")


def recipe_from_data(data: Any, where: str) -> Recipe:
    """The recipe that `recipe_yaml` wrote, as plain data."""
    if not isinstance(data, dict):
        raise PlanError(where, "is no mapping", f"Write {', '.join(_FIELDS)}; `hqc recipes export hq-dm` shows one.")
    if unknown := [key for key in data if key not in _FIELDS]:
        raise PlanError(where, f"has no field {unknown[0]!r}; there are {', '.join(_FIELDS)}", "Correct it.")
    if missing := [key for key in ("name", "steps") if key not in data]:
        raise PlanError(where, f"lacks {missing[0]!r}", "`hqc recipes export hq-dm` shows a whole one.")
    texts = {key: data.get(key, "") for key in ("name", "source", "doc")}
    if wrong := [key for key, value in texts.items() if not isinstance(value, str)]:
        raise PlanError(where, f"{wrong[0]} is {data[wrong[0]]!r}; expected a text", "Put it in quotes.")
    if not isinstance(data["steps"], list) or not data["steps"]:
        raise PlanError(where, "steps is no list", "Write one step an item.")
    steps = tuple(
        from_data(step, STEPS, PARTS, f"{where}, step {index}") for index, step in enumerate(data["steps"], 1)
    )
    return Recipe(texts["name"], texts["source"], steps, _sampler(data.get("sampler", {}), where), texts["doc"])


def _sampler(data: Any, where: str) -> Sampler:
    if not isinstance(data, dict):
        raise PipelineTextError(f"{where}, sampler", "is no mapping", "Write its options as name: value.")
    return built(f"{where}, sampler", Sampler, data)  # type: ignore[no-any-return]


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file."""
    from pydantic import TypeAdapter

    steps = schema_of(STEPS)
    definitions = steps.pop("$defs")
    sampler = TypeAdapter(Sampler).json_schema() | {"additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hqc recipe",
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "source": {"type": "string"},
            "doc": {"type": "string"},
            "sampler": sampler,
            "steps": {**steps, "minItems": 1},
        },
        "required": ["name", "steps"],
        "additionalProperties": False,
        "$defs": definitions,
    }
