"""``collogue tune``: measure one-shot and two-shot on this machine's GPUs and write the table that plans use (docs/tuning.md).

``trials`` says what is measured, ``rank`` is one rank's part, ``steps`` makes steps of times, ``main`` is the whole run.
"""
