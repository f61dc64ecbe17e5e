"""Reports as one HTML file that opens offline: no request leaves the page."""

from __future__ import annotations
