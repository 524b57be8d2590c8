"""A packed model larger than a GPU's memory: its first layers run there, the others and the head on the CPU.

    engine = SplitEngine.from_model(model, gpu_layers=20)
    logits = engine(ids, engine.new_cache(1, 512), last_only=True)

The residual stream of the new tokens crosses over once a call, as float32: 4 * hidden_size bytes a token.
"""

import torch
from torch import Tensor

from bitnet.inference.cpu_engine import Engine, NativeCache
from bitnet.inference.cpu_rows import check_cache_dtype
from bitnet.inference.gpu_engine import GpuCache, GpuEngine
from bitnet.inference.weights import LaterLayers, ModuleWeights
from bitnet.model import BitNetForCausalLM, ModelConfig


class SplitCache:
    """Keys and values of the first layers on the GPU, of the others in main memory."""

    def __init__(self, config: ModelConfig, gpu: GpuCache, cpu: NativeCache) -> None:
        self.config, self.gpu, self.cpu = config, gpu, cpu

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.cpu.length

    @length.setter
    def length(self, length: int) -> None:
        self.gpu.length = self.cpu.length = length

    @property
    def max_length(self) -> int:
        return self.cpu.max_length

    @property
    def batch_size(self) -> int:
        return self.cpu.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of the filled part, which one decoding step reads."""
        return self.gpu.nbytes + self.cpu.nbytes


class SplitEngine:
    """The first layers of a model on the Triton kernels, the others on the native ones. Called like
    `BitNetForCausalLM`. Raises as both engines do."""

    def __init__(self, config: ModelConfig, gpu: GpuEngine, cpu: Engine) -> None:
        """`gpu`: of the first layers alone; `cpu`: of the others and the head."""
        self.config, self.gpu, self.cpu = config, gpu, cpu

    @classmethod
    def from_model(
        cls,
        model: BitNetForCausalLM,
        gpu_layers: int,
        *,
        device: torch.device | str = "cuda",
        dtype: str = "bfloat16",
        cache_dtype: str | None = None,
    ) -> "SplitEngine":
        """Of a packed torch model, `gpu_layers` of its layers on `device`; `dtype` counts there, `cache_dtype` on both
        sides. Raises ValueError unless at least one layer is left for each side."""
        config = model.config
        layers = config.num_hidden_layers
        if not 1 <= gpu_layers < layers:
            raise ValueError(
                f"{gpu_layers} layers on the GPU do not split a model of {layers}; give 1 to {layers - 1}, or choose "
                "the device for all"
            )
        check_cache_dtype(cache_dtype)
        gpu = GpuEngine.from_model(model, device=device, dtype=dtype, cache_dtype=cache_dtype, layers=gpu_layers)
        others = LaterLayers(ModuleWeights(model, "int8", None), gpu_layers)
        cpu = Engine(config.replace(num_hidden_layers=layers - gpu_layers), others, cache_dtype=cache_dtype)
        return cls(config, gpu, cpu)

    def __call__(self, input_ids: Tensor, cache: SplitCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits float32 `[B, T, V]` of token ids int64 `[B, T]`, or `[B, 1, V]` of the last position with `last_only`,
        on the CPU. With a cache, the tokens continue the ones it holds. Raises ValueError as the engines do."""
        cache = self.new_cache(*input_ids.shape) if cache is None else cache
        if cache.config != self.config:
            raise ValueError("the cache belongs to a model of another shape; take one from new_cache")
        return self.cpu.go_on(self.gpu(input_ids, cache.gpu).cpu(), cache.cpu, last_only=last_only)

    @property
    def device(self) -> torch.device:
        """Where ids and logits are."""
        return torch.device("cpu")

    def new_cache(self, batch_size: int, max_length: int) -> SplitCache:
        """An empty cache."""
        return SplitCache(
            self.config, self.gpu.new_cache(batch_size, max_length), self.cpu.new_cache(batch_size, max_length)
        )

    def warm_up(self) -> None:
        """As `GpuEngine.warm_up`."""
        self.gpu.warm_up()

    def weight_bytes(self) -> int:
        """Bytes of weights that one decoding step reads, on both sides."""
        return self.gpu.weight_bytes() + self.cpu.weight_bytes()
