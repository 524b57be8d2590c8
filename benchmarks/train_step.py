"""Time of a training step: the ternary model, its float twin and transformers' Llama, side by side in one process.

    python benchmarks/train_step.py [--preset small --batch-size 2] [--threads 2] [--rounds 15] [--no-peer]

Both models have the same shape, batch and optimizer, and are compiled as train.py compiles them. A round times one
step of each in turn, so that a machine that slows down slows all; a ratio is the median of the rounds' ratios.
Before any time is printed, the compiled ternary model's loss and gradients must agree with the eager fake-quant
reference's, and transformers' loss with that of our model of its weights; otherwise the script stops. Transformers'
Llama has the same shape (no sub-norms, which it does not know), batch and type, and AdamW; it is measured compiled and
not, and the faster one counts. Where a step's time goes is profiled behind that: seconds by kind of operation, of
forward and backward and of the optimizer. Beside the times stands what autograd keeps for the backward, weights left
out. Results go to benchmarks/results/train_step.json.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from bitnet.bench.report import describe_machine
from bitnet.kernels import training_product
from bitnet.machine import eager, int8_pays, pick_device, pick_dtype
from bitnet.model import BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.training import config as recipes
from bitnet.training.compiling import compile_model
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
    peer: bool = True
    """Whether transformers' Llama takes its turn."""


class Contender:
    """One model with everything a step needs, on random tokens."""

    def __init__(self, config: recipes.TrainConfig, model: ModelConfig, options: Options) -> None:
        self.device = pick_device(options.device)
        self.dtype = pick_dtype(options.dtype, self.device)
        self.grad_clip = config.optim.grad_clip
        quantized = model.quantizer != "none"
        self.int8 = quantized and int8_pays(options.product, self.device, self.dtype)
        self.gradients_int8 = options.product == "int8-all"
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
            layer.product = training_product(layer.product, layer.weight, layer.quantizer, 1.0, int8=wanted,
                                             gradients=self.gradients_int8)  # fmt: skip

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


class Peer:
    """Transformers' Llama of a shape, with AdamW, on the same tokens. `compiled` is whether torch compiles it whole."""

    def __init__(self, ours: Contender, config: recipes.TrainConfig, *, compiled: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        c = ours.model.config
        shape = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_word_embeddings, use_cache=False,
        )  # fmt: skip
        self.ours, self.grad_clip = ours, config.optim.grad_clip
        torch.manual_seed(0)
        with torch.device(ours.device):
            self.model: Any = LlamaForCausalLM(shape)
        self.check()
        self.run: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def loss(self, run: Any) -> torch.Tensor:
        with torch.autocast(self.ours.device.type, dtype=self.ours.dtype, enabled=self.ours.dtype != torch.float32):
            logits = run(input_ids=self.ours.input_ids).logits.float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.ours.labels.flatten())

    def check(self) -> None:
        """Raise SystemExit where its loss is not that of our model of the same weights."""
        twin = BitNetForCausalLM(self.ours.model.config.replace(quantizer="none", sub_norm=False)).to(self.ours.device)
        twin.load_state_dict(
            {name: value for name, value in self.model.state_dict().items() if name in twin.state_dict()}
        )
        with (
            torch.no_grad(),
            torch.autocast(self.ours.device.type, dtype=self.ours.dtype, enabled=self.ours.dtype != torch.float32),
        ):
            wanted = float(twin.loss(self.ours.input_ids, self.ours.labels))
            found = float(self.loss(self.model))
        if abs(found / wanted - 1) > 1e-3:
            raise SystemExit(f"transformers' loss is {found} and ours, of the same weights, {wanted}")

    def step(self) -> float:
        """Seconds of forward, backward, clipping and optimizer."""
        start = time.perf_counter()
        self.loss(self.run).backward()
        clip_gradients(list(self.model.parameters()), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ours.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_int_mm", "mkl::_mkl_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
}
"""Operations by the beginning of their names; what torch.compile has fused is `fused`, everything else `other`."""


def profile(contender: Contender, steps: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by kind of operation, of forward and backward and of clipping and optimizer."""
    parts: dict[str, dict[str, float]] = {}

    def forward_backward() -> None:
        contender.quantize()
        contender.forward_backward()

    def update() -> None:
        clip_gradients(list(contender.model.parameters()), contender.grad_clip)
        contender.optimizer.step()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):  # whose own start takes time
        contender.gradients()
    totals = {"forward and backward": Counter[str](), "optimizer": Counter[str]()}
    for _ in range(steps):
        for part, run in (("forward and backward", forward_backward), ("optimizer", update)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                run()
            for event in found.key_averages():
                totals[part][kind_of(event.key)] += event.self_cpu_time_total / steps / 1e3
    for part, total in totals.items():
        parts[part] = {kind: round(value, 1) for kind, value in total.most_common()}
    return parts


def kind_of(name: str) -> str:
    for kind, beginnings in KINDS.items():
        if name.startswith(beginnings):
            return kind
    return "fused" if "ompiled" in name or "cpp_fused" in name else "other"


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


def fastest_peer(twin: Contender, config: recipes.TrainConfig) -> Peer:
    """Compiled or not, whichever step is faster."""
    times = dict[bool, float]()
    peers = {
        compiled: Peer(twin, config, compiled=compiled) for compiled in ({True, False} if twin.compiled else {False})
    }
    for compiled, peer in peers.items():
        for _ in range(2):
            peer.step()
        times[compiled] = min(peer.step() for _ in range(3))
    return peers[min(times, key=lambda compiled: times[compiled])]


def transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


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
    peer = fastest_peer(twin, config) if options.peer else None
    rounds = [(ternary.step(), twin.step(), peer.step() if peer else 0.0) for _ in range(options.rounds)]
    ratios = sorted(a / b for a, b, _ in rounds)
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    tokens = ternary.input_ids.numel()
    result = {
        **dataclasses.asdict(options),
        "dtype": str(ternary.dtype).removeprefix("torch."),
        "device": str(ternary.device),
        "machine": describe_machine(),
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
        "profile_ms": {name: profile(each) for name, each in (("ternary", ternary), ("twin", twin))},
    }
    if peer:
        beside = {name: sorted(row[2] / row[i] for row in rounds) for i, name in enumerate(("ternary", "twin"))}
        result |= {
            "transformers": transformers_version(),
            "transformers_compiled": peer.run is not peer.model,
            "transformers_ms": round(seconds[2] * 1e3, 1),
            **{f"faster_than_transformers_{name}": round(statistics.median(each), 3) for name, each in beside.items()},
        }
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([*rows, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
