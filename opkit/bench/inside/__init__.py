"""What runs in the engine's own interpreter: files that import no opkit, run by their path.

They keep to Python 3.10, since an engine's container need not have opkit's Python. As scripts they
see this folder alone, so that none of opkit's packages hides one of the engine's.
"""
