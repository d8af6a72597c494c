"""`hqc compare-recipes`: recipes on one program, with equal budgets, on the same images, as one table.

`entries` are the recipes by name, `budget` scales them, `subject` is the program with its pipeline and how images are
drawn, `cells` makes and measures one (recipe, bits, seed) stage by stage, `images` is what a stage keeps, `size` counts
true bits, `run` goes over all cells, `rows` and `table` are what is printed, `page` and `plots` the HTML and pictures,
`record` tells whose a work folder is.
"""
