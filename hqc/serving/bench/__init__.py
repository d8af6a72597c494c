"""`bench-serve`: requests that arrive at random, to a server of its own on the loopback interface.

    source ──server (one process a policy)──▶ port ◀──HTTP, streams── load (Poisson, or always so many) ──▶ figures

The policies are measured in turns on the same arrivals: adaptive, continuous, static and one-at-a-time batching.
"""
