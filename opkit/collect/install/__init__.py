"""Laying tables out for aiconfigurator, and the proof that it reads them. Imports nothing of it."""
