"""``collogue bench``: latency on this machine's GPUs, with floors and other libraries' all-reduce in the same run.

``cases`` says what is timed, ``timing`` how; ``fused``, ``floors`` and ``baselines`` are what is timed; ``rank`` is one rank's
part, ``latency`` the whole run, ``report`` the tables, ``readme`` the table in README.md. No number is kept whose outputs did
not pass their gate in the same process.
"""
