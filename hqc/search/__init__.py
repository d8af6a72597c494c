"""Mixed precision: which site gets which bits, so that the whole stays within a budget and errs least.

`budget` is what is asked for, `costs` what every site takes at every width, `journal` and `measure` how much the output
errs when one site alone is quantised, `allocate` the choice, `run` all of it: a plan file (`hqc.recipes.plan_file`).
"""

from hqc.search.budget import Budget, parse_budget
from hqc.search.run import Asked, Found, search

__all__ = ["Asked", "Budget", "Found", "parse_budget", "search"]
