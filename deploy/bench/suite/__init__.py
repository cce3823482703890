"""Benchmarks of the engine itself, driven in this process: no server, no network in between.

Each module measures one thing and returns a `Result` (`result.py`), which `output.py` writes as
JSON, a Markdown table and a plot.
"""
