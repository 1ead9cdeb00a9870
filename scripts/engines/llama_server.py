"""llama.cpp's own server with a .gguf file, from the package xllamacpp, which brings it built.

    python -m scripts.engines.llama_server FILE

Prints the address, and serves until it is ended.
"""

import sys
import time

import xllamacpp


def main(file: str) -> None:
    wish = xllamacpp.CommonParams()
    wish.model.path = file
    wish.n_ctx, wish.n_parallel, wish.warmup = 256, 1, False
    server = xllamacpp.Server(wish)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
