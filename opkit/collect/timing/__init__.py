"""How one case is timed: devices, iterations, kernels, clocks, power. Knows no op and no table."""
