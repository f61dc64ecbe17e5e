"""Run both sides of an alignment under Nsight Systems: the serving engine (E2E) and the mock.

``engines``       the serving engines known: how to recognise, reach and ask each, NVTX
``command_line``  reads the user's command: engine, model, address, the engine's own flags
``target``        the command with the flags, variables and YAML that a recording needs
``plan``          what will be done: steps that ``--dry-run`` prints and ``perform`` executes
``modes``         the plans: server, program, system-wide, per-rank
``perform``       executes a plan; whatever happens, nothing it started is left running
``process``       one launch under nsys: its processes, its log and its end
``server``        HTTP to the server: health, model name, waves of requests
``e2e``           request in, plan out; plan in, reports and sidecar manifests out
``mock``          the same for ``opkit.layers.drive``
"""
