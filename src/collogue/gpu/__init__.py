"""How a call runs on a GPU: compiled kernels, launches, the workspace, failures."""
