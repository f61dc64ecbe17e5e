"""WHAT PEOPLE SEE: one file an output format, all from the same results; computes nothing."""
