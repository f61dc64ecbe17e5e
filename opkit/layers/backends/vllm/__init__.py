"""vLLM 0.24.0: its server's configuration cut down to one layer, and its worker driven by hand."""
