"""Is a call right, what does it return: its arguments checked, its outputs described."""
