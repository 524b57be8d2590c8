"""What the memory and the time of a training step depend on: the model's shape, the batch, and how it is computed."""

from dataclasses import dataclass

import torch

from bitnet.machine import MAPPED_BLOCK_COMPILED
from bitnet.model import ModelConfig


@dataclass(frozen=True)
class Workload:
    """What the memory of a step depends on, in one of `processes` processes."""

    model: ModelConfig
    sequences: int
    """B, of a micro-batch in this process."""
    window: int
    """T."""
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float32
    """Of the matrix products."""
    device: str = "cpu"
    """Its kind."""
    int8: bool = False
    """Whether the quantized products are int8."""
    int8_gradients: bool = False
    """Whether those of their backward are."""
    compiled: bool = False
    recompute: bool = False
    loss_chunk: int = 0
    masked: bool = False
    """Whether attention keeps to documents."""
    micro_batches: int = 1
    strategy: str = "none"
    """none, ddp or fsdp."""
    processes: int = 1
    reduced: int = 4
    """Bytes of a value of the gradients that FSDP sends."""
    float_start: bool = False
    """Whether the run begins without quantizers."""
    ramp: bool = False
    """Whether it fades them in, on float products."""
    timed: bool = False
    """Whether some steps are timed first, and undone."""
    async_save: bool = False
    """Whether checkpoints are written from a copy, beside the steps."""
    teacher: ModelConfig | None = None
    """The shape of a model that runs beside every step, whole in each process, to learn from."""
    lora: int = 0
    """Rank of the adapters that train, on a model that is frozen; 0: all of it trains."""
    frozen: int = 0
    """Bytes of that model as it lies in memory."""
    tempered: bool = False
    """Whether its distribution is taken at a temperature other than 1."""
    layer_steps: int = 0
    """Of each layer in the layer-wise start; 0 without one."""
    layer_tokens: int = 0
    """Tokens that it sees."""

    @property
    def owners(self) -> int:
        """Processes that parameters, gradients and moments are cut for."""
        return self.processes if self.strategy == "fsdp" else 1

    @property
    def tokens(self) -> int:
        """M, of a micro-batch in this process."""
        return self.sequences * self.window

    @property
    def value(self) -> int:
        """a, bytes of a value in the matrix products."""
        return 2 if self.dtype == torch.bfloat16 else 4

    @property
    def quantized(self) -> bool:
        return self.model.quantizer != "none"

    @property
    def stays_in_heap(self) -> bool:
        """Whether a step's blocks are left in the heap, since clearing new ones would be a fifth of its time."""
        small = 4 * self.tokens * self.model.hidden_size < MAPPED_BLOCK_COMPILED
        return self.device == "cpu" and self.compiled and small

    @property
    def copies_weights(self) -> bool:
        """Whether the float products read another tensor than the parameter."""
        return not self.int8 and self.strategy != "fsdp" and (self.quantized or self.value == 2)
