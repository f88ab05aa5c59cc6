"""``collogue ablate``: what single choices in the kernels are worth, each measured alone against the kernels as they are.

``switches`` names the choices, as edits of the kernel sources that live here and not there; ``build`` compiles them, ``facts`` says what
needs no GPU (registers, code, bits by the emulator), ``rank`` and ``main`` measure them in turn in one run.
"""
