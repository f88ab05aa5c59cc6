"""The command line and what stands behind it. The library imports nothing from here."""
