"""llama.cpp's own server with a .gguf file, from the package xllamacpp, which brings it built.

    python -P llama_server.py FILE [PORT]

Prints the address, and serves until it is ended. OMP_NUM_THREADS counts: its threads wait for one
another at work, which takes long where the cores have other work.
"""

import os
import sys
import time

import xllamacpp


def main(file: str, port: str = "0") -> None:
    wish = xllamacpp.CommonParams()
    wish.model.path = file
    wish.n_ctx, wish.n_parallel, wish.port = 512, 1, int(port)
    if threads := int(os.environ.get("OMP_NUM_THREADS", "0")):
        wish.cpuparams.n_threads = wish.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(wish)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
