"""How a model uses it: modules, tensor-parallel models, the compile pass."""
