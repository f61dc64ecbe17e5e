"""HOW FAST AND AT WHAT POWER an engine serves: tokens/s, latencies, watts, joules a token."""
