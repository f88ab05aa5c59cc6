"""``collogue bench``: latency on this machine's GPUs, with floors and other libraries in the same run.

``cases`` says what is timed, in suites, ``timing`` how; ``fused``, ``floors``, ``baselines`` and ``epilogue`` are what is timed; ``rank``
is one rank's part, ``latency`` the whole run, ``report`` the tables, ``readme`` the table in README.md; ``page``, ``plot`` and
``regression`` make an HTML page of results. ``model`` is a benchmark of its own, of the layers in ``stack`` and of what ``variants`` puts
between them. No number is kept whose outputs did not pass their gate in the same process.
"""
