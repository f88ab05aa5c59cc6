"""``collogue bench``: latency on this machine's GPUs, with floors and other libraries in the same run.

``cases`` says what is timed, in suites, ``timing`` how; ``fused``, ``floors``, ``baselines`` and ``epilogue`` are what is timed; ``rank``
is one rank's part, ``latency`` the whole run, ``report`` the tables, ``readme`` the table in README.md; ``page``, ``plot`` and
``regression`` make an HTML page of results. No number is kept whose outputs did not pass their gate in the same process.
"""
