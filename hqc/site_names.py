"""Names of sites: what a pattern matches, parts of a site that is split, and the product of its binary codes."""

import fnmatch
import re

__all__ = ["main_site", "names_site", "part_site", "residual_site", "whole_site"]


def names_site(pattern: str, site: str) -> bool:
    """Whether a wildcard pattern matches a site, or the one that it is a part of.

    >>> names_site("*.conv_shortcut", "up.0.conv_shortcut:1"), names_site("*:0", "up.0.conv_shortcut:1")
    (True, False)
    """
    return any(fnmatch.fnmatchcase(name, pattern) for name in {site, whole_site(site)})


def part_site(site: str, number: int) -> str:
    """The name of a part of a split site, counted from 0.

    >>> part_site("up.0.conv_shortcut", 1)
    'up.0.conv_shortcut:1'
    """
    return f"{site}:{number}"


def whole_site(site: str) -> str:
    """The site that a part belongs to; the site itself if it is whole.

    >>> whole_site("up.0.conv_shortcut:1"), whole_site("conv_in"), whole_site("conv_in:residual")
    ('up.0.conv_shortcut', 'conv_in', 'conv_in')
    """
    return re.sub(r":\d+$", "", main_site(site))


def residual_site(site: str) -> str:
    """The name of the product of a site's binary codes.

    >>> residual_site("up.0.conv1")
    'up.0.conv1:residual'
    """
    return f"{site}{_RESIDUAL}"


def main_site(site: str) -> str:
    """The site whose binary codes a site holds; the site itself if it holds none.

    >>> main_site("up.0.conv1:residual"), main_site("up.0.conv1:0")
    ('up.0.conv1', 'up.0.conv1:0')
    """
    return site.removesuffix(_RESIDUAL)


_RESIDUAL = ":residual"
