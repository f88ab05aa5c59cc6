"""Which algorithm a call takes, in which launch shape, and why."""
