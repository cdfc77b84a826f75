"""TensorRT engines: which library is here, how a plan is built, and the passport that says where it may run.

    library.py      TensorRT 10.3 to 11, or TensorRT-RTX, and what it says while it works
    building.py     ONNX -> plan, one path for all of them
    passport.py     the JSON beside each plan, compared with this machine before the plan is touched
    making.py       bundle -> engine in the bundle's folder ``engines``, with its parity
    cuda.py         the few calls of the driver that running a plan needs
    commands.py     magsd engine

Nothing here needs torch, and nothing but ``making`` needs ONNX Runtime: an engine is built on the device that runs it.
"""
