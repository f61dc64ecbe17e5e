"""Engines behind one small protocol: start, generate, close."""
