"""Shared fixtures: ``browser``, one headless Chromium for all pages of a run."""

from browser import browser

__all__ = ["browser"]
