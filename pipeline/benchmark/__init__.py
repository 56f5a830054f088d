"""Latency that can be trusted: what is measured, in which order, and what the times prove."""
