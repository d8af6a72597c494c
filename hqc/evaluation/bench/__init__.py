"""`hqc bench`: a model against its peers, each in a process of its own, in turns on the same inputs.

`run` is the whole benchmark; `models` makes what is timed, in a work folder, `peers` lists what it is compared with,
`worker` is the child process and `contender` the parent's end of it, `rounds` takes turns, `result` holds the figures,
`table` and `chart` show them. Nothing is imported here: a worker's memory is counted, so it loads only its runtime.
"""
