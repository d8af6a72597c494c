"""Which recipes are compared, by the names that are typed."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hqc.errors import PlanError
from hqc.recipes import RECIPES, Recipe, find_recipe
from hqc.recipes.plan_file import PlanFile, read_plan
from hqc.recipes.rotation import rotation

__all__ = ["ADD", "ALL", "LEAVE_OUT", "PLAN", "Entry", "find_entries", "require_widths"]

ALL = "all"
ADD, LEAVE_OUT = "+hadamard", "-hadamard"
PLAN = "@"
_NO_PLAN = PlanFile(())


@dataclass(frozen=True)
class Entry:
    """A recipe under the name that the table gives it. plan: bits and ranks of single sites."""

    name: str
    recipe: Recipe
    plan: PlanFile = _NO_PLAN

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^a-z0-9+@-]+", "-", self.name.lower())

    def fits(self, bits: str) -> bool:
        """Whether it is compared at these bits: one whose plan says its bits is at those alone."""
        return self.plan.bits in ("", bits)

    def meets(self, other: "Entry") -> bool:
        """Whether both would be in one row."""
        return self.slug == other.slug and (self.fits(other.plan.bits) or other.fits(self.plan.bits))


def find_entries(text: str) -> tuple[Entry, ...]:
    """The recipes of a comma-separated list, each once: names, files, either with +hadamard or -hadamard; or `all`.

    `RECIPE@PLAN.yaml` is a recipe with the plan in a file. Plans of one name may stand beside each other where each
    says other bits.

    Raises:
        PlanError, PipelineTextError: if there is no such recipe or plan, a suffix changes nothing, or two share a name.
    """
    entries: list[Entry] = []
    for name in _names(text):
        entry = _planned(name)
        known = next((other for other in entries if entry.meets(other)), None)
        if known is None:
            entries.append(entry)
        elif (known.recipe, known.plan) != (entry.recipe, entry.plan):
            raise PlanError(f"recipe {name!r}", f"has the name of another, {known.name!r}", "Rename one of them.")
    return tuple(entries)


def require_widths(entries: Iterable[Entry], widths: Collection[str]) -> None:
    """Refuses an entry that no width has a cell of.

    Raises:
        PlanError: naming its plan.
    """
    for entry in entries:
        if not any(map(entry.fits, widths)):
            found = f"says bits {entry.plan.bits}, and {', '.join(widths)} is asked for"
            raise PlanError(entry.plan.where, found, "Add its bits, or leave the plan out.")


def _names(text: str) -> Iterator[str]:
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise PlanError(f"--recipes {text}", "has an empty name", f"Write it as in rtn,rtn{ADD},hq-dm.")
        yield from (*RECIPES, f"rtn{ADD}") if name == ALL else (name,)


def _planned(text: str) -> Entry:
    name, has_plan, path = text.partition(PLAN)
    if not has_plan or Path(text).is_file():
        return _entry(text)
    if not name or not path:
        raise PlanError(f"recipe {text!r}", "is no recipe with a plan", f"Write it as in hq-dm{PLAN}plan.yaml.")
    entry, plan = _entry(name), read_plan(Path(path))
    return Entry(f"{entry.name}{PLAN}{Path(path).stem}", entry.recipe.following(plan.rules), plan)


def _entry(name: str) -> Entry:
    if name in RECIPES:
        return Entry(name, RECIPES[name])
    if name.endswith(ADD):
        found = find_recipe(name.removesuffix(ADD))
        return _changed(name, found, found.rotated(rotation("sylvester")), ADD, "has that rotation already")
    if name.endswith(LEAVE_OUT):
        found = find_recipe(name.removesuffix(LEAVE_OUT))
        return _changed(name, found, found.unrotated(), LEAVE_OUT, "has no rotation to leave out")
    found = find_recipe(name)
    return Entry(found.name, found)


def _changed(name: str, found: Recipe, changed: Recipe, suffix: str, same: str) -> Entry:
    if changed == found:
        raise PlanError(f"recipe {name!r}", f"{found.name} {same}", f"Write it without {suffix}.")
    return Entry(f"{found.name}{suffix}", changed.named(f"{found.name}{suffix}"))
