"""Decoding in worker processes that can be killed, for pictures from untrusted sources.

A few workers are kept warm. Each decodes one picture at a time, within ``MAX_CPU_SECONDS`` and
``MAX_BYTES_ABOVE_BASE``; one that breaks a limit, crashes or is no longer wanted is replaced.
The workers are not a sandbox: they bound the cost of a picture, not what an exploit could do.
Where processes have no such limits (Windows) pictures are decoded in this process.
"""

from __future__ import annotations

import atexit
import os
import queue
import select
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from sam4mllm_tool.concurrency import check_cancelled
from sam4mllm_tool.errors import ImageError
from sam4mllm_tool.images.decoder_process import read_message, write_message
from sam4mllm_tool.images.decoding import decode

MAX_CPU_SECONDS = 5
MAX_BYTES_ABOVE_BASE = 1024**3
MAX_SECONDS = 30.0
"""How long one picture may take by the clock, on a machine that is busy with other work."""

_AVAILABLE = os.name == "posix"
_POLL_SECONDS = 0.05
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")


def decode_isolated(data: bytes, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
    """:func:`sam4mllm_tool.images.decoding.decode` in a worker process.

    Raises:
        ImageError: not a picture, broken, over a limit, or too costly to decode.
        CallCancelled: the current call is no longer wanted.
    """
    if not _AVAILABLE:
        return decode(data, max_pixels)
    return _shared_pool(os.getpid()).decode(data, max_pixels)


def warm_up() -> None:
    """Start the worker processes now, so that the first picture need not wait for them."""
    if _AVAILABLE:
        _shared_pool(os.getpid())


@cache
def _shared_pool(process: int) -> DecoderPool:
    """The pool of this process: a forked child must not talk to its parent's workers."""
    pool = DecoderPool(size=max(2, min(4, os.cpu_count() or 1)))
    atexit.register(pool.close)
    return pool


class DecoderPool:
    """Warm worker processes; safe to use from many threads.

    Args:
        size: how many pictures are decoded at a time.
    """

    def __init__(self, size: int) -> None:
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(_Worker())

    def decode(self, data: bytes, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
        """See :func:`decode_isolated`."""
        worker = self._next_idle()
        try:
            return worker.decode(data, max_pixels)
        finally:
            if worker.ended:
                worker.kill()
                worker = _Worker()
            self._idle.put(worker)

    def close(self) -> None:
        """End the idle workers; a busy one ends with this process."""
        while not self._idle.empty():
            self._idle.get().kill()

    def _next_idle(self) -> _Worker:
        while True:
            check_cancelled()
            try:
                return self._idle.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue


class _Worker:
    """One worker process, which needs some tenths of a second before it answers."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        # Threads of numpy's would each take address space.
        environment["OPENBLAS_NUM_THREADS"] = environment["OMP_NUM_THREADS"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sam4mllm_tool.images.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            process_group=0,  # an interrupt at the terminal is for this process
        )
        self._ready = False
        self.ended = False

    def decode(self, data: bytes, max_pixels: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Have the process decode one picture; ``ended`` says whether it can be used again."""
        reading, writing = self._pipes()
        deadline = time.monotonic() + MAX_SECONDS
        self.ended = True
        try:
            if not self._ready:
                self._wait(reading, deadline)
                read_message(reading)
            limits = {"cpu_seconds": MAX_CPU_SECONDS, "extra_bytes": MAX_BYTES_ABOVE_BASE}
            write_message(writing, {"max_pixels": max_pixels, **limits}, data)
            self._wait(reading, deadline)
            reply, pixels = read_message(reading)
        except (EOFError, OSError) as error:
            raise self._failure() from error
        self._ready, self.ended = True, False
        if "error" in reply:
            raise ImageError(reply["error"], hint=reply["hint"])
        size = reply["width"], reply["height"]
        return Image.frombytes("RGB", size, pixels), tuple(reply["notes"])

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        for pipe in self._pipes():
            pipe.close()
        self._process.wait()

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        reading, writing = self._process.stdout, self._process.stdin
        assert reading is not None and writing is not None
        return reading, writing  # type: ignore[return-value]

    def _wait(self, reading: BinaryIO, deadline: float) -> None:
        while not select.select([reading], [], [], _POLL_SECONDS)[0]:
            check_cancelled()
            if time.monotonic() > deadline:
                raise ImageError(
                    f"Decoding the picture took longer than {MAX_SECONDS:g} s.",
                    hint="Save it again as a plain PNG or JPEG.",
                )

    def _failure(self) -> ImageError:
        """Why the process ended."""
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGXCPU:
            reason = f"takes more than {MAX_CPU_SECONDS} s of computing"
        else:
            reason = "makes the decoder fail"
        return ImageError(
            f"Decoding the picture {reason}.", hint="Save it again as a plain PNG or JPEG."
        )
