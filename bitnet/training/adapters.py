"""Training LoRA adapters: the frozen model that they stand on, and what a run leaves of them.

A run with `--lora` keeps in its checkpoints the adapters alone, with the files that say of which model they are, and at
its end writes those of the best one to OUT/adapter. Whoever goes on with it opens the model of `--init` again, whose
weights must be what they were.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from bitnet.model import BitNetForCausalLM
from bitnet.model.lora import fingerprint, make_trainable
from bitnet.storage.adapters import ADAPTER_BASE, base_files, save_adapter
from bitnet.storage.folders import folder_of
from bitnet.storage.json_files import CheckpointError, load_json
from bitnet.storage.source import Source, open_source
from bitnet.training.config import TrainConfig
from bitnet.training.processes import World


@dataclass(frozen=True)
class Base:
    """A model that stays as it is, and the adapters' settings."""

    source: Source
    model: BitNetForCausalLM
    weights: str
    """Its fingerprint."""
    config: TrainConfig

    @classmethod
    def open(cls, config: TrainConfig, saved: Path | None, world: World) -> "Base":
        """The model of `--init`; `saved` is the checkpoint that the run goes on from. Raises CheckpointError where its
        adapters were trained on other weights, ValueError for several processes, and as `open_source` does."""
        assert config.init is not None
        if world.size > 1:
            raise ValueError(f"adapters train in one process, and there are {world.size}; start without torchrun")
        source = open_source(config.init)
        model = source.frozen()
        weights = fingerprint(model)
        if saved and (before := load_json(saved / ADAPTER_BASE).get("fingerprint")) != weights:
            raise CheckpointError(
                f"{config.init} holds other weights ({weights[:12]}) than those that the adapters were trained on "
                f"({str(before)[:12]}); restore them, or start a new run"
            )
        return cls(source, model, weights, config)

    def with_adapters(self, device: torch.device) -> BitNetForCausalLM:
        """The model on a device, frozen, with adapters that change nothing yet. Raises ValueError for a model that
        cannot have any."""
        assert self.config.lora is not None
        model = self.model.to(device).train()
        make_trainable(model, self.config.lora, self.config.alpha)
        return model

    def files(self) -> dict[str, bytes]:
        """What every checkpoint holds beside its tensors."""
        assert self.config.lora is not None
        return base_files(str(self.config.init), self.weights, self.config.lora, self.config.alpha)


def write_adapter(run: Path) -> Path:
    """Write the adapters of a run's best checkpoint to their folder, in the place of what an earlier end of this run
    has left there. Raises OSError."""
    folder = run / "adapter"
    if (folder / ADAPTER_BASE).is_file():
        shutil.rmtree(folder)
    save_adapter(folder, folder_of(run, "best"))
    return folder
