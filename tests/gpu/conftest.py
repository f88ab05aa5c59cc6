"""CUDA reads its environment once: it is set before anything asks for a GPU."""

from collogue.testing import environment

environment.set_defaults()
