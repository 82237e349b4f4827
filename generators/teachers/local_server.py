"""Runs llama.cpp's server in a process of its own: a crash or a busy loop in it can't take the run along.

`python -m generators.teachers.local_server MODEL.gguf SLOTS CONTEXT THREADS` prints the server's address as one line once the
model is loaded, and ends when its standard input closes. That is how it learns that its parent is gone, even by `kill -9`.
"""

from __future__ import annotations

import os
import sys


def main(model: str, slots: int, context: int, threads: int) -> None:
    """Serve `model` with so many slots of so many tokens of context each, until standard input closes."""
    # llama.cpp prints to standard output at will; the address goes out on a copy of it, the rest to the log.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = context * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.use_jinja = True
    server = xllamacpp.Server(params)
    print(server.listening_address, file=out, flush=True)
    while sys.stdin.buffer.read(1 << 16):
        pass
    os._exit(0)  # nothing is worth saving here, and the server's own farewell waits for calls that nobody reads


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:5]))
