"""A process that answers each line of JSON on its stdin with one on its stdout."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any


class Silent(Exception):
    """The process ended, or said nothing for too long; the message has its last words."""


class Conversation:
    """``facts``: its first line, said unasked. Killed when it is closed, whatever it is doing."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, patience: float) -> None:
        """``patience``: seconds without a word after which it is given up.

        Raises
        ------
        Silent
            If it has no first line.
        """
        self._patience = patience
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._errors: list[str] = []
        # An unread pipe would stop a talkative library
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, **what: Any) -> dict[str, Any]:
        """Its answer; raises :class:`Silent`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words say why
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(self._patience, self._process.kill)
        late.start()
        try:
            for line in self._process.stdout:
                with contextlib.suppress(ValueError):  # some libraries print there what is not for us
                    facts = json.loads(line)
                    if isinstance(facts, dict):
                        return facts
        finally:
            late.cancel()
        self._process.kill()
        self._reader.join(5)
        said = " ".join("".join(self._errors).split())[-300:]
        raise Silent(f"its process ended or was silent for {self._patience:.0f} s ({said or 'no message'})")

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            self._errors.extend(self._process.stderr)
