#!/usr/bin/env python3
"""A host in Python: a disk of memory, shown as a file, with nothing but ctypes.

    python3 python_host.py LIBBLKFUSE FILE [KEY=VALUE]...

FILE becomes a disk of 1 MiB until the input ends; KEY=VALUE sets a property of
the export. The lines that it understands are at the end of this file.

blkfuse.h describes every function; it holds for Python, too. What a program in
Python has to know besides:

1. The library calls the callbacks on its own threads, and each call waits for
   Python's lock (the GIL). So nobody may hold that lock and wait for the file.
   ctypes.CDLL lets go of it while a function of the library runs (PyDLL does
   not), and so do open(), os.pread() and their like. These do not:
   - memory that the file is mapped to: do not mmap it here
   - subprocess, until the child has become the other program; and before that
     the child closes its copies of this process's files. So have the file
     closed here when a program is started that is to use it.
2. If a callback raises, ctypes prints that and returns 0, which means success.
   So every callback is wrapped in something that returns an error.
3. The library copies the table of callbacks, but not what keeps the functions
   alive in Python: that is up to the table. Keep it until the export is gone,
   and delete the export before the interpreter ends.
"""

import contextlib
import ctypes
import errno
import functools
import os
import queue
import sys
import threading
import traceback

# ---- From blkfuse.h ----

API_VERSION = 1
PENDING = 1
MAY_UNMAP = 1
HOLE = 1
EVENTS = {1: "started", 2: "halted", 3: "unmounted"}

I, I64, U32, U64, SIZE = (
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_size_t,
)
# Callbacks see it as a number, or as None if it is NULL.
POINTER = ctypes.c_void_p


class Extent(ctypes.Structure):
    _fields_ = [("bytes", U64), ("flags", U32), ("reserved", U32)]


class DriverOps(ctypes.Structure):
    """What a host does not set stays NULL. Members at the end that it does not
    know can be left out: `struct_size` says what is there."""

    _fields_ = [
        ("struct_size", SIZE),
        ("api_version", U32),
        ("request_ctx_size", U32),
        ("length", ctypes.CFUNCTYPE(I64, POINTER)),
        ("allocated_size", ctypes.CFUNCTYPE(I64, POINTER)),
        ("limits", ctypes.CFUNCTYPE(None, POINTER, POINTER)),
        ("read", ctypes.CFUNCTYPE(I, POINTER, POINTER, POINTER, U64, U64, U32)),
        ("write", ctypes.CFUNCTYPE(I, POINTER, POINTER, POINTER, U64, U64, U32)),
        ("flush", ctypes.CFUNCTYPE(I, POINTER, POINTER, U32)),
        ("discard", ctypes.CFUNCTYPE(I, POINTER, POINTER, U64, U64, U32)),
        ("write_zeroes", ctypes.CFUNCTYPE(I, POINTER, POINTER, U64, U64, U32)),
        ("truncate", ctypes.CFUNCTYPE(I, POINTER, POINTER, U64, U32)),
        (
            "block_status",
            ctypes.CFUNCTYPE(I, POINTER, POINTER, U64, U64, ctypes.POINTER(Extent), U32),
        ),
        ("queue_start", ctypes.CFUNCTYPE(I, POINTER, U32, ctypes.POINTER(POINTER))),
        ("queue_stop", ctypes.CFUNCTYPE(None, POINTER, U32, POINTER)),
        ("batch_begin", ctypes.CFUNCTYPE(None, POINTER, U32, POINTER)),
        ("batch_end", ctypes.CFUNCTYPE(None, POINTER, U32, POINTER)),
        ("idle", ctypes.CFUNCTYPE(None, POINTER)),
        ("event", ctypes.CFUNCTYPE(None, POINTER, U32, I, ctypes.c_char_p)),
        ("deleted", ctypes.CFUNCTYPE(None, POINTER)),
    ]


FUNCTIONS = {
    "export_create": (ctypes.POINTER(POINTER), ctypes.POINTER(DriverOps), POINTER),
    "export_set_str": (POINTER, ctypes.c_char_p, ctypes.c_char_p),
    "export_get_str": (POINTER, ctypes.c_char_p, ctypes.c_char_p, SIZE),
    "export_start": (POINTER,),
    "export_drain_begin": (POINTER,),
    "export_drain_poll": (POINTER,),
    "export_drain_end": (POINTER,),
    "export_resized": (POINTER,),
    "export_delete_wait": (ctypes.POINTER(POINTER), I64),
    "request_complete": (POINTER, I),
}


class Library:
    """The functions, without their prefix. They raise OSError if they fail."""

    def __init__(self, path):
        library = ctypes.CDLL(path)
        message = library.blkfuse_error_message
        message.restype = ctypes.c_char_p

        def check(result, _function, _arguments):
            if result < 0:
                raise OSError(-result, message().decode())
            return result

        for name, arguments in FUNCTIONS.items():
            function = getattr(library, "blkfuse_" + name)
            function.argtypes = arguments
            function.restype = I
            function.errcheck = check
            setattr(self, name, function)


# ---- The device ----


def no_flags(flags, known=0):
    if flags & ~known:
        raise OSError(errno.ENOTSUP, "unknown flags")


class Disk:
    """A bytearray. Python's lock is all that its methods need: they run one at
    a time, whatever threads they are called on."""

    def __init__(self, library, size):
        self.library = library
        self.data = bytearray(size)
        self.calls = 0
        self.flushes = 0
        self.later = queue.SimpleQueue()
        self.worker = threading.Thread(target=self.complete_flushes)
        self.worker.start()

    def close(self):
        self.later.put(None)
        self.worker.join()

    def part(self, offset, count):
        self.calls += 1
        # Without this, a slice would quietly be shorter.
        if offset + count > len(self.data):
            raise OSError(errno.EIO, "past the end of the disk")
        return slice(offset, offset + count)

    def length(self):
        return len(self.data)

    def read(self, _request, buffer, offset, count, flags):
        no_flags(flags)
        ctypes.memmove(buffer, bytes(self.data[self.part(offset, count)]), count)

    def write(self, _request, buffer, offset, count, flags):
        no_flags(flags)
        self.data[self.part(offset, count)] = ctypes.string_at(buffer, count)

    def write_zeroes(self, _request, offset, count, flags):
        no_flags(flags, MAY_UNMAP)
        self.data[self.part(offset, count)] = bytes(count)

    def block_status(self, _request, offset, count, extent, flags):
        """What is all zeroes, by blocks of 4096, is a hole."""
        no_flags(flags)
        self.part(offset, count)

        def is_hole(at):
            block = self.data[at // 4096 * 4096 :][:4096]
            return block.count(0) == len(block)

        end = offset
        while end < len(self.data) and is_hole(end) == is_hole(offset):
            end = end // 4096 * 4096 + 4096
        extent[0] = Extent(min(end, len(self.data)) - offset, HOLE if is_hole(offset) else 0)

    def flush(self, request, flags):
        """Memory needs none. It shows how a request is completed later, by
        another thread: its pointer is a number, and can be passed on."""
        no_flags(flags)
        self.later.put(request)
        return PENDING

    def complete_flushes(self):
        while (request := self.later.get()) is not None:
            self.flushes += 1
            self.library.request_complete(request, 0)


# ---- The export ----


def callback(function):
    """What the library calls in the place of `function`; see rule 2 above. It
    leaves out `opaque`, since a method of Python knows its object."""

    @functools.wraps(function)
    def call(_opaque, *arguments):
        try:
            # None is what a method returns that returns nothing.
            return function(*arguments) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except BaseException:
            traceback.print_exc()
            return -errno.EIO

    return call


class Export:
    """Shows a disk as a file, for as long as a `with` lasts."""

    def __init__(self, library, disk, path, properties):
        self.library = library
        self.handle = POINTER()
        self.quiet = threading.Event()
        self.deleted = threading.Event()
        ops = DriverOps(ctypes.sizeof(DriverOps), API_VERSION)
        hooks = {"idle": self.quiet.set, "event": self.event, "deleted": self.deleted.set}
        for name, kind in DriverOps._fields_:
            function = hooks.get(name) or getattr(disk, name, None)
            if function:
                setattr(ops, name, kind(callback(function)))
        # The functions live as long as the table: rule 3.
        self.ops = ops
        library.export_create(self.handle, ops, None)
        try:
            for key, value in {"mountpoint": path, "writable": "on", **properties}.items():
                library.export_set_str(self.handle, key.encode(), os.fsencode(value))
            library.export_start(self.handle)
        except BaseException:
            self.delete()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.delete()

    def delete(self):
        """Returns when no callback is running and none will follow. Does not
        end as long as a request is pending that nobody completes."""
        self.library.export_delete_wait(self.handle, -1)

    def get(self, key):
        text = ctypes.create_string_buffer(256)
        self.library.export_get_str(self.handle, key.encode(), text, len(text))
        return text.value.decode()

    @contextlib.contextmanager
    def drained(self):
        """Within this, nothing reads or writes the disk, and clients wait."""
        self.library.export_drain_begin(self.handle)
        try:
            while self.library.export_drain_poll(self.handle):
                self.quiet.wait()
                self.quiet.clear()
            yield
        finally:
            self.library.export_drain_end(self.handle)

    def resized(self):
        self.library.export_resized(self.handle)

    def event(self, event, _error, message):
        print(EVENTS.get(event, event), message.decode(), file=sys.stderr)


# ---- The program ----


def serve(export, disk):
    """Does what the lines of the input say, and answers each with a line."""

    def answer(*words):
        print(*words, flush=True)

    answer("serving over", export.get("transport"))
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "calls":
            answer(disk.calls)
        elif command == "flushes":
            answer(disk.flushes)
        elif command == "drain":
            with export.drained():
                answer("drained")
                for line in sys.stdin:
                    if line.split() == ["resume"]:
                        break
                    answer(disk.calls)
            answer("resumed")
        elif command == "resize":
            with export.drained():
                old, new = len(disk.data), int(arguments[0])
                if new > old:
                    disk.data.extend(bytes(new - old))
                else:
                    del disk.data[new:]
                export.resized()
            answer("resized")
        elif command == "spoil":
            disk.data, disk.kept = None, disk.data
            answer("spoilt")
        elif command == "mend":
            disk.data = disk.kept
            answer("mended")


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: python_host.py LIBBLKFUSE FILE [KEY=VALUE]...")
    library = Library(sys.argv[1])
    disk = Disk(library, 1 << 20)
    try:
        properties = dict(setting.split("=", 1) for setting in sys.argv[3:])
        with Export(library, disk, sys.argv[2], properties) as export:
            serve(export, disk)
        print("deleted" if export.deleted.is_set() else "not deleted", flush=True)
    except OSError as error:
        sys.exit(f"python_host: {error.strerror}")
    finally:
        disk.close()


if __name__ == "__main__":
    main()
