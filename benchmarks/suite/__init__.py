"""The parts of ``python -m benchmarks``; docs/benchmarks.md says what each measures.

runner.py     the command line; each part in a process of its own
context.py    what a part is given: films, bundles, folders
films.py      drawn films of any size and format, of no patient
processes.py  a command as a process of its own: seconds, processor time, peak of memory
figures.py    medians, ratios by round, the exponent of a curve and whether it bends upward; no clock, no process
report.py     what a part found: tables, goals, curves; as JSON and as text
charts.py     bars and log-log curves as SVG

cold.py, warm.py, network.py, growth.py, memory.py, peers.py    the parts, each ``run_part(context) -> Report``
through_torch.py, engine_worker.py, rows_worker.py, peer_*.py   programs that they start
"""
