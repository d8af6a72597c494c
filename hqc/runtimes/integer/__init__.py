"""A quantised program as a graph whose products are integer, over an interchangeable set of kernels.

In the order in which data meets it: `forms` brings a program into rotated integers, `tidy` takes out what does nothing,
`weights` holds the codes, `place` puts kernel calls (`layers`) in the places of sites, `fusions` let them take in what
stands around them, `precision` casts the rest to half, `build` does all of that and writes a `report`. `kernel_set`
says what kernels there are; `reference` has them in plain torch, so that every graph is tested on a CPU.

`cuda/` is the `torch-cuda` runtime: Triton kernels, CUDA graphs. `cpu/` is `torch-int8`: oneDNN's products, passes
compiled for the machine.
"""
