"""One backend in a process of its own: does what a line on stdin asks for, and says how long it took.

Two networks in one process disturb each other, and the peak of memory is that of a process.

    python -m magsd_runtime.benchmarking.worker BUNDLE BACKEND IMAGE [THREADS]

    it prints   {"ready": true, "device", "precision", "reason", "open_seconds", "first_seconds"}
    {"batch": 8, "calls": 5}    ->  {"seconds": [..]}    the network alone, each call on 8 images
    {"files": 5}                ->  {"seconds": [..]}    from the file to the prediction, without overlay
    {"memory": true}            ->  {"peak_bytes": 1}
    or, of a fault, {"error": "...", "code": 6} and ends
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(arguments: list[str]) -> int:
    from ..errors import ImageError, MagsdError

    started = time.perf_counter()
    try:
        from ..images import read_radiograph
        from ..pipeline import Pipeline
        from ..preprocessing import preprocess

        bundle, backend, image = arguments[:3]
        threads = int(arguments[3]) if len(arguments) > 3 else None
        if threads is not None:
            import cv2

            cv2.setNumThreads(threads)
        pipeline = Pipeline.open(bundle, backend, threads=threads)
        opened = time.perf_counter()
        prediction = pipeline.predict(image, with_heat=False).prediction
        first = time.perf_counter()
        if prediction.status in ("error", "rejected"):
            reason = prediction.reasons[0]
            if reason.code == "unreadable":
                raise ImageError(f"{image}: {reason.message}")
            if prediction.status == "error":
                raise MagsdError(f"{image}: {reason.message}")
            raise ImageError(
                f"{image}: is rejected ({reason.code}), which needs no network: name a film that is judged by --image"
            )
        standardized = preprocess(read_radiograph(image).pixels, pipeline.bundle.preprocessing)
    except MagsdError as error:
        _say({"error": str(error), "code": error.exit_code})
        return error.exit_code
    with pipeline:
        used = pipeline.backend
        facts = {"ready": True, "device": used.device, "precision": used.precision, "reason": used.reason}
        _say({**facts, "open_seconds": opened - started, "first_seconds": first - opened})
        for line in sys.stdin:
            try:
                _say(_do(json.loads(line), pipeline, image, standardized))
            except MagsdError as error:
                _say({"error": str(error), "code": error.exit_code})
                return error.exit_code
    return 0


def _do(asked: dict[str, Any], pipeline: Any, image: str, standardized: Any) -> dict[str, Any]:
    if asked.get("memory"):
        return {"peak_bytes": peak_memory()}
    if "files" in asked:
        return {
            "seconds": [_timed(lambda: pipeline.predict(image, with_heat=False)) for _ in range(int(asked["files"]))]
        }
    import numpy as np

    images = np.stack([standardized] * int(asked["batch"]))
    return {"seconds": [_timed(lambda: pipeline.backend.run(images)) for _ in range(int(asked["calls"]))]}


def _timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_memory() -> int | None:
    """Bytes of main memory that this process held at most; None where the system does not tell.

    Linux's ``getrusage`` also counts the process that started this one, before it became this program.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
