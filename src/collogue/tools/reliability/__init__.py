"""``collogue reliability``: millions of checked calls, fault injection, and what the protection costs, on real GPUs.

``compare`` checks outputs on the device, ``soak`` makes the calls, ``faults`` does what must not be done and records what every rank saw,
``jobs`` runs all of it in processes that are watched and ended, ``main`` puts the results together.
"""
