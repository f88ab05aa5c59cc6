"""Groups whose ranks do not reach each other's memory: their own collectives move the bytes, kernels or the reference add and finish."""
