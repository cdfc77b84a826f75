"""What ``--backend`` takes, for command lines that need no backend yet: importing ``backends`` brings numpy."""

BACKENDS = ("auto", "cpu", "cpu-int8", "cuda", "tensorrt", "ort-tensorrt", "ort-rtx")
