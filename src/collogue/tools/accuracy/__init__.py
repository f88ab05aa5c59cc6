"""``collogue accuracy``: what formats, static scales and the order of accumulation cost a model. ``collogue calibrate``: its scales.

``models`` are what is measured, ``orders`` the ways to add, ``measure`` the arithmetic of the results, ``main`` the whole run,
``calibrate`` collects amax and writes scales in named conventions. Everything runs on one machine without GPUs; the ranks are threads.
"""
