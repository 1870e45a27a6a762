"""The process that decodes untrusted pictures: reads pictures on stdin, writes pixels.

Started by :mod:`sam4mllm_tool.images.isolation`; ends when stdin does. A message is the length of
a JSON header as four bytes, the header, and as many bytes as its ``size`` states.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import sys
from typing import Any, BinaryIO

from sam4mllm_tool.errors import ImageError

_LENGTH = struct.Struct(">I")


def write_message(stream: BinaryIO, header: dict[str, Any], body: bytes = b"") -> None:
    """Write one message."""
    head = json.dumps({**header, "size": len(body)}).encode()
    stream.write(_LENGTH.pack(len(head)) + head)
    stream.write(body)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Read one message.

    Raises:
        EOFError: the stream ended.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    header = json.loads(_exactly(stream, length))
    return header, _exactly(stream, header["size"])


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Decode pictures until stdin ends."""
    # The decoders' libraries may print; what they print must not get into the messages.
    reading, writing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from sam4mllm_tool.images.decoding import decode

    base = _address_space()
    write_message(writing, {"ready": True})
    while True:
        try:
            request, data = read_message(reading)
        except EOFError:
            return
        _limit(request["cpu_seconds"], base + len(data) + request["extra_bytes"])
        try:
            image, notes = decode(data, request["max_pixels"])
            reply = {"width": image.width, "height": image.height, "notes": notes}
            body = image.tobytes()
        except ImageError as error:
            reply, body = {"error": error.message, "hint": error.hint}, b""
        except MemoryError:
            reply = {"error": "The pixels take too much memory.", "hint": "Scale the picture down."}
            body = b""
        write_message(writing, reply, body)


def _address_space() -> int:
    import psutil

    return psutil.Process().memory_info().vms


def _limit(cpu_seconds: int, address_space: int) -> None:
    """Bound what the next picture costs: beyond the time the system ends this process.

    Where the system has no such limits the parent's clock remains.
    """
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    with contextlib.suppress(ValueError, OSError):  # macOS takes no limit of the address space
        resource.setrlimit(resource.RLIMIT_AS, (address_space, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
