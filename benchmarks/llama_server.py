"""llama.cpp's server, compiled, out of a wheel: `pip install xllamacpp==2026.10.11549`, if need be with `--target`.

    PYTHONPATH=TARGET python benchmarks/llama_server.py -m model.gguf --host 127.0.0.1 --port 8080 -np 8 -c 2048 -t 2

The options are those of llama-server that benchmarks/serve_load.py gives; everything else is as llama-server has it.
"""

import argparse
import threading

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", required=True, help="a GGUF file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-np", type=int, default=1, help="texts at a time")
    parser.add_argument("-c", type=int, default=0, help="tokens of all of them together")
    parser.add_argument("-t", type=int, default=-1, help="threads")
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = given.m, [given.host], given.port
    params.n_parallel, params.n_ctx = given.np, given.c
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.t
    print(xllamacpp.get_system_info())
    server = xllamacpp.Server(params)
    print("listens at", server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
