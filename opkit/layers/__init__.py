"""WHAT is measured: ops, their cases, their mock layers, and the process that nsys profiles.

One op is one folder here; one file in it per backend. Frameworks (torch, vllm, …) are imported
only inside the backend files that need them, and only when a mock is built. Nothing here knows nsys
files or verdicts.
"""
