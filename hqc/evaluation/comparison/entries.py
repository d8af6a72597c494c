"""Which recipes are compared, by the names that are typed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hqc.errors import PlanError
from hqc.recipes import RECIPES, Recipe, find_recipe
from hqc.recipes.rotation import rotation

__all__ = ["ADD", "ALL", "LEAVE_OUT", "Entry", "find_entries"]

ALL = "all"
ADD, LEAVE_OUT = "+hadamard", "-hadamard"


@dataclass(frozen=True)
class Entry:
    """A recipe under the name that the table gives it."""

    name: str
    recipe: Recipe

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^a-z0-9+-]+", "-", self.name.lower())


def find_entries(text: str) -> tuple[Entry, ...]:
    """The recipes of a comma-separated list, each once: names, files, either with +hadamard or -hadamard; or `all`.

    Raises:
        PlanError, PipelineTextError: if there is no such recipe, a suffix changes nothing, or two share a name.
    """
    entries: dict[str, Entry] = {}
    for name in _names(text):
        entry = _entry(name)
        known = entries.setdefault(entry.slug, entry)
        if known.recipe != entry.recipe:
            raise PlanError(f"recipe {name!r}", f"has the name of another, {known.name!r}", "Rename one of them.")
    return tuple(entries.values())


def _names(text: str) -> Iterator[str]:
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise PlanError(f"--recipes {text}", "has an empty name", f"Write it as in rtn,rtn{ADD},hq-dm.")
        yield from (*RECIPES, f"rtn{ADD}") if name == ALL else (name,)


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
