"""``collogue resources``: what the compiler made of the kernels, for every architecture, on a machine without a GPU.

``worker`` compiles (this revision's kernels, or another's in a process of its own), ``machine_code`` reads the cubin, ``occupancy``
is arithmetic, ``measure`` puts them together, ``compare`` holds two sets of results, or one and its limits, against each other.
"""
