"""``magsd benchmark``: how fast a bundle answers here, on each backend.

worker.py     the process of one backend
measuring.py  starts the processes, lets them take turns, collects
summary.py    percentiles, ratios, the table and the record
plot.py       one picture, as SVG
commands.py   the command line
"""
