"""Options that choose a recipe and change its steps, and the recipe that they ask for."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from hqc.commands.applies import asked
from hqc.commands.options import ROTATION_KINDS, options, rules_option

if TYPE_CHECKING:
    from hqc.recipes import Recipe
    from hqc.recipes.plan_file import PlanFile

__all__ = ["plan_and_bits", "recipe_asked", "recipe_options", "sampler_of_recipe_options", "with_sampler"]

recipe_options = options(
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="STEP.OPTION=VALUE",
        help="Change an option of a step, as in distil.epochs=10; may repeat. `hqc recipes show` lists them.",
    ),
    rules_option,
    click.option(
        "--hadamard",
        is_flag=False,
        flag_value=ROTATION_KINDS[0],
        type=click.Choice(ROTATION_KINDS),
        metavar=f"[{'|'.join(ROTATION_KINDS)}]",
        help=f"Rotate activations before quantising, with the recipe's steps otherwise; {ROTATION_KINDS[0]} unless "
        "another is named.",
    ),
    click.option("--no-hadamard", is_flag=True, help="The same recipe without rotation (the method's ablation)."),
    click.option(
        "--block",
        type=click.Choice(["8", "16", "32", "64", "128", "256"]),
        help="Order of the rotation (default: the recipe's, else 32).",
    ),
)
sampler_of_recipe_options = options(
    click.option(
        "--num-inference-steps", "--n-steps", type=click.IntRange(1, 1000), help="Of the sampler (default: recipe's)."
    ),
    click.option(
        "--guidance-scale",
        type=click.FloatRange(0, 100),
        help="Classifier-free guidance; none up to 1 (default: the recipe's).",
    ),
    click.option("--eta", type=click.FloatRange(0, 1), help="Noise of the sampler (default: the recipe's)."),
)


def recipe_asked(name: str, given: dict[str, Any]) -> "Recipe":
    """The recipe of that name with what the options of `recipe_options` change; they are taken out of `given`.

    Raises:
        PlanError, PipelineTextError: if there is no such recipe, step or option, or a value does not fit.
        OptionError: for options that exclude each other.
    """
    from hqc.errors import OptionError
    from hqc.recipes import find_recipe

    found = find_recipe(name)
    rules, kind, plain, block, changes = (
        given.pop(key) for key in ("rules", "hadamard", "no_hadamard", "block", "changes")
    )
    if rules is not None:
        found = found.set("select_layers.rules", rules)
    if kind is not None and plain:
        raise OptionError("--hadamard", "and --no-hadamard exclude each other", "Give one of them.")
    found = _rotated(found, kind, None if block is None else int(block), plain=plain)
    for change in changes:
        path, value = _change(change)
        found = found.set(path, value)
    return found


def _rotated(found: "Recipe", kind: Any, order: int | None, *, plain: bool) -> "Recipe":
    from hqc.errors import PlanError
    from hqc.recipes.rotation import rotation

    if plain:
        found = found.unrotated()
    if kind is not None:
        return found.rotated(rotation(kind, order))
    if order is None:
        return found
    if found.step("insert_hadamard") is None:
        raise PlanError(f"--block {order}", "there is no rotation to give an order to", "Ask for the rotation too.")
    return found.set("insert_hadamard.block", order)


def _change(text: str) -> tuple[str, Any]:
    """`distil.epochs=10` -> ("distil.epochs", 10): the value is YAML."""
    from hqc.errors import PlanError
    from hqc.recipes.files import option_value

    path, equals, value = text.partition("=")
    if not equals or not all(path.partition(".")):
        raise PlanError(f"--set {text}", "is not STEP.OPTION=VALUE", "Write it as in --set distil.epochs=10.")
    return path.strip().replace("-", "_"), option_value(value, f"--set {path}")


def plan_and_bits(given: dict[str, Any]) -> "tuple[PlanFile, str]":
    """The plan in the file of --plan, and the bits of what it says nothing about; both are taken out of `given`.

    Raises:
        PlanError: if the file holds none, or says other bits than those that were typed.
    """
    from hqc.recipes.plan_file import plan_asked

    plan, bits = plan_asked(given.pop("plan_file")), given.pop("bits").lower()
    return plan, plan.bits_with(bits if asked("bits") else None)


def with_sampler(recipe: "Recipe", given: dict[str, Any]) -> "Recipe":
    """With the sampler's options that were typed; they are taken out of `given`.

    Raises:
        OptionError: for a number of steps of a recipe that calls the model once.
    """
    from hqc.errors import OptionError

    steps, once = given["num_inference_steps"], recipe.sampler.timestep is not None
    if once and asked("num_inference_steps") and steps != 1:
        found = f"recipe {recipe.name!r} calls the model once, at timestep {recipe.sampler.timestep:g}"
        do = "Leave it out, or give --set sampler.timestep=null too."
        raise OptionError(f"--num-inference-steps {steps}", found, do)
    changed = {}
    for name in ("num_inference_steps", "guidance_scale", "eta"):
        value = given.pop(name)
        if asked(name):
            changed[name] = value
    return replace(recipe, sampler=replace(recipe.sampler, **changed))
