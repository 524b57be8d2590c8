"""Speeds of generation on this machine, beside its own limits, float twins and other engines.

    bitnet bench --threads 1 2 --json result.json      a random model of the 2B shape
    bitnet bench runs/demo --batch 1 4 16              a trained one
    bitnet bench --preset 700m --kernels --twins
    bitnet bench --device cuda --json gpu.json         the Triton kernels, the GPU engine and training

It ends with status 1 where a correctness gate is red or a peer failed.
"""

from dataclasses import fields

from bitnet.bench.options import Options

ON_GPU = ("device", "preset", "json", "quick")
"""Options that count on a GPU."""


def run(options: Options) -> int:
    """Returns 1 where a gate is red or a peer failed. Raises ValueError for an option that the device has no use of."""
    if options.device != "cpu":
        for field in fields(options):
            value = getattr(options, field.name)
            if field.name not in ON_GPU and value != field.default:
                what = f"{value}" if field.name == "model" else f"--{field.name} {value}"
                raise ValueError(f"{what} has no effect with --device {options.device}; leave it out")

    import torch

    threads = torch.get_num_threads()
    try:
        if options.device != "cpu":
            from bitnet import kernels
            from bitnet.bench import gpu

            device = gpu.device_of(options.device)
            kernels.triton.require(device)
            presets = (options.preset,) if options.preset else ("2b-4t", "700m")
            return gpu.run(gpu.Options(device, presets, options.quick), options.json)
        from bitnet.bench import cpu

        return cpu.run(options)
    finally:
        torch.set_num_threads(threads)
