"""The parts of ``benchmarks/gpu.py``: engine, ratios, training. Each is a function of a :class:`context.Context`."""
