"""How long collectives take between the GPUs of one host: NCCL's, and the engines' own all-reduce.

``run.run_comm`` is the one call; ``rank`` is the process that each GPU gets.
"""
