"""How long: admission, sweep, timing, power, workers, tables, provenance, verify, install, comm.

What must not live here: how a layer is built (``layers``), how a trace is read (``nsys_parsers``),
how a verdict is reached (``align``; of it only the ledger and its plain results are read).
"""
