"""Time of a training step: the ternary model against its float twin, side by side in one process.

    python benchmarks/train_step.py [--preset small --batch-size 2] [--threads 2] [--rounds 15]

Both models have the same shape, batch and optimizer, and are compiled as train.py compiles them. A round times one
step of each in turn, so that a machine that slows down slows both; the ratio is the median of the rounds' ratios.
Before any time is printed, the compiled ternary model's loss and gradients must agree with the eager fake-quant
reference's; otherwise the script stops. Beside the times stands what autograd keeps for the backward, weights left
out. Results go to benchmarks/results/train_step.json.
"""

import dataclasses
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.kernels import training_product
from bitnet.machine import compile_model, cpu_capabilities, eager, int8_pays, pick_device, pick_dtype
from bitnet.model import BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.training import config as recipes
from bitnet.training.optimizer import Optimizer, clip_gradients
from bitnet.training.saved import storages_saved

RESULTS = Path(__file__).parent / "results" / "train_step.json"


@dataclass(frozen=True)
class Options:
    preset: str = "demo"
    """Preset of train.py: its shape, batch and optimizer."""
    batch_size: int | None = None
    """Sequences in a step, of one micro-batch; the preset's unless given."""
    product: str = "auto"
    """As in train.py."""
    rounds: int = 15
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"


class Contender:
    """One model with everything a step needs, on random tokens."""

    def __init__(self, config: recipes.TrainConfig, model: ModelConfig, options: Options) -> None:
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        self.grad_clip = config.optim.grad_clip
        quantized = model.quantizer != "none"
        self.int8 = quantized and int8_pays(options.product, self.device, self.dtype)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = BitNetForCausalLM(model)
        self.optimizer = Optimizer(self.model, config.optim)
        shape = (options.batch_size or config.batch_size // config.micro_batches, config.window + 1)
        ids = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.input_ids, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.compiled = compile_model(self.model)

    def quantize(self, wanted: bool = True) -> None:
        """What train.py does once a step, if this contender does."""
        for _, layer in bit_linears(self.model) if self.int8 else ():
            layer.product = training_product(layer.product, layer.weight, layer.quantizer, 1.0, int8=wanted)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps from the forward for the backward, parameters and their codes left out."""
        with storages_saved(self.model) as kept:
            loss = self.model.loss(self.input_ids, self.labels)
        del loss
        return sum(kept.values())

    def forward_backward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model.loss(self.input_ids, self.labels)
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """Seconds of forward, backward, clipping and optimizer."""
        start = time.perf_counter()
        self.quantize()
        self.forward_backward()
        clip_gradients(list(self.model.parameters()), self.grad_clip)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def gradients(self) -> tuple[float, torch.Tensor]:
        """Loss and all gradients, without a step."""
        loss = float(self.forward_backward())
        flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        for parameter in self.model.parameters():
            parameter.grad = None
        return loss, flat


def check(contender: Contender) -> float:
    """Relative error of the compiled gradient against the eager one. Raises SystemExit where it is no rounding."""
    contender.quantize()
    loss, gradient = contender.gradients()
    contender.quantize(False)  # the fake-quant reference
    with eager():
        expected_loss, expected = contender.gradients()
    contender.quantize()
    error = float((gradient - expected).norm() / expected.norm())
    # Rounding in a float product flips some INT8 codes by one; in bfloat16 it does so more often.
    limit = 0.05 if contender.dtype == torch.float32 else 0.15
    if abs(loss / expected_loss - 1) > 1e-3 or not error < limit:
        raise SystemExit(f"compiled and eager differ: loss {loss} against {expected_loss}, gradient error {error:.3f}")
    return error


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = recipes.PRESETS[options.preset]
    ternary, twin = (
        Contender(config, config.model.replace(quantizer=quantizer), options) for quantizer in ("ternary", "none")
    )
    error = max(check(contender) for contender in (ternary, twin))
    saved = [contender.saved_bytes() for contender in (ternary, twin)]
    for contender in (ternary, twin):
        for _ in range(3):
            contender.step()
    rounds = [(ternary.step(), twin.step()) for _ in range(options.rounds)]
    ratios = sorted(a / b for a, b in rounds)
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    tokens = ternary.input_ids.numel()
    result = {
        **dataclasses.asdict(options),
        "dtype": str(ternary.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name()
        if ternary.device.type == "cuda"
        else cpu_capabilities().get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "compiled": ternary.compiled,
        "parameters": ternary.model.num_parameters(),
        "tokens_per_step": tokens,
        "int8_product": ternary.int8,
        "saved_activations_mb": [round(size / 1e6, 1) for size in saved],
        "ternary_ms": round(seconds[0] * 1e3, 1),
        "twin_ms": round(seconds[1] * 1e3, 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "gradient_error_compiled_against_eager": round(error, 5),
    }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*rows, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
