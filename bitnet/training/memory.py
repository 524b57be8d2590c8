"""How much memory a training step takes in one process, from the shape of the model alone.

The parts, in bytes, for a micro-batch of M = B T tokens. P counts parameters, P' those of the projections; a is the
size of a value in the matrix products: 4, or 2 in bfloat16, where weights are copied for the product.

    parameters      4 P
    moments         AdamW 8 P;  Muon 4 P' + 8 (P - P')
    gradients       4 P, made from the last layer to the first; throughout with DDP or several micro-batches
    step weights    int8 products: codes, P'.  Else, of quantizers or in bfloat16: the W~ of the product, a P', kept by
                    the layers for their backward; the head's copy in bfloat16, a V C
    activations     what autograd keeps of a layer for the backward:
        norms           4 M (2C + 1) each: x, 1/rms, normalized x
        attention       a M (2Q + 2K) + 4 M H: rotated q and k, v, output, log-sum-exp; a M T of a mask
        feed-forward    3 a M F: gate, its activation, up
        sub norms       a M + 4 M each, of widths Q and F, and the second one's x; in bfloat16 two float x of both
        inputs          of the seven projections, a M (3C + Q + 2C + F), or int8 codes and a scale; a float layer's in
                        float32 are shared: a M (C + Q + C + F)
                    the embedding's output and the final norm: 4 M (2C + 1), and the head's input a M C
    loss            4 M V for the backward, and twice that within it; a `loss_chunk` of tokens instead of M
    teacher         its parameters, those of its projections and its head as a product reads them; its distribution for
                    the backward, 4 M V, and the own one again at another temperature; five times that within the loss
    workspace       gradients of activations within a layer; in the optimizer, Muon's work on the largest matrix, and
                    with FSDP its updates in bfloat16, sent, received and answered: 6 P' / W
    save            a copy of parameters and moments, where checkpoints are written beside the steps
    gaps            where a small compiled model's blocks stay in the heap, GAPS of what comes and goes

A compiled layer keeps less, since it makes again in the backward what is cheap to make: of the norms x and 1/rms, of
the feed-forward gate and up, the inputs once for each norm, of int8 codes those of width C alone, and 4 M of every
scale. A compiled loss keeps logits of a M V and works in place. With `recompute` only the layers' inputs are kept,
and one layer whole. With FSDP a process has 1/W of parameters, gradients and moments, gathers the embedding for the
whole step and two layers at a time, and has the gradient of one of them.

The peak is the largest of these moments: the backward of the loss (all activations, no gradients), of the last and the
first layer (which has its own activations and all gradients), of the embedding (its gradient beside the head's, where
they are tied), and the optimizer's step. A warm start in float and a ramp are phases of their own. Not modelled: what a
GPU's allocator rounds up, and communication buffers.

Letters: B sequences of a micro-batch, T window, C hidden_size, H heads, Q = H D and K = G D widths of queries and
keys, F intermediate_size, V vocab_size, L layers, W processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bitnet.console import table
from bitnet.kernels import PACKED_BITS
from bitnet.model import BitNetForCausalLM, ModelConfig, bit_linears
from bitnet.training.workload import Workload

CUDA_LIBRARIES = 290e6 if torch.backends.cuda.is_built() else 0.0
"""What a torch that is built for CUDA takes more on a CPU too. Measured on Linux: 2.11 248 MB, 2.12 306 MB."""
PROCESS = {False: 425e6 + CUDA_LIBRARIES, True: 530e6 + CUDA_LIBRARIES}
"""Python, torch, its optimizer, and the ends of huge pages; compiled or not. Measured on Linux, torch 2.13."""
PROCESS_PART = "Python and torch"
GAPS = 0.15  # of what comes and goes in a step, what the heap cannot use of itself; measured 0.10 to 0.14
LAYER_STEP_TOKENS = 2048  # in a step of the layer-wise start, or one sequence where that is longer


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the moment of the peak, in one process, and which moment that is."""

    parts: dict[str, float]
    moment: str
    work: Workload
    """As it is in that phase of the run."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def summary(self) -> str:
        """One line."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        shares = ", ".join(f"{size / 1e9:.2f} {name}" for name, size in largest)
        return f"about {self.total / 1e9:.2f} GB a process at its peak: {shares}"

    def table(self) -> str:
        """A line for each part, and the total."""
        rows = [*self.parts.items(), ("total", self.total)]
        return table([[name, f"{size / 1e9:.3f} GB"] for name, size in rows if size], right=[1], indent="  ")


def meta_model(config: ModelConfig) -> BitNetForCausalLM:
    """The model without memory behind its tensors; any size is there in a second or two."""
    with torch.device("meta"):
        return BitNetForCausalLM(config)


def layer_activations(work: Workload) -> int:
    """Bytes that autograd keeps of one layer for its backward, weights left out."""
    c, M, a = work.model, work.tokens, work.value
    C, H, F = c.hidden_size, c.num_attention_heads, c.intermediate_size
    Q, K = H * c.head_width, c.num_key_value_heads * c.head_width
    attention = a * (2 * Q + 2 * K) + 4 * H + (a * work.window if work.masked else 0)
    G = c.num_key_value_heads
    # Of a head's norm: what goes in, what it was divided by, and what is multiplied with the weight.
    of_heads = a * (Q + K) + 4 * (H + G) if c.qk_norm else 0
    shared = work.compiled or (not work.quantized and a == 4)
    # Without sub norms a float product reads what attention and feed-forward keep, and what the latter makes.
    own_output = 0 if not c.sub_norm and not work.quantized else Q
    if work.compiled:
        norms = 4 * C + 4 * 2 + (4 * 2 if c.sub_norm else 0) + a * C  # x, 1/rms, and o_proj's output for the second x
        inputs = 2 * C + 4 * 4 if work.int8 else a * (C + own_output + C + F)
        return M * (norms + attention + of_heads + a * 2 * F + inputs)
    if c.qk_norm:
        of_heads += 4 * (Q + K) + (0 if a == 4 else 4 * (Q + K))
    norms = 2 * 4 * (2 * C + 1)
    feed_forward = a * 3 * F
    sub_norms = 0
    if c.sub_norm:
        sub_norms = a * (Q + F) + 4 * 2 + (4 * F if a == 4 else 2 * 4 * (Q + F))
    if work.int8:
        inputs = 5 * C + Q + F + 4 * 7
    elif shared:
        inputs = a * (2 * C + own_output + F)
    else:
        own_output = Q if c.sub_norm or work.quantized else 0
        inputs = a * (5 * C + own_output + F)
    return M * (norms + attention + of_heads + feed_forward + sub_norms + inputs)


def layer_input(work: Workload) -> int:
    """Bytes of a layer's input, all that `recompute` keeps."""
    return 4 * work.tokens * work.model.hidden_size


def head_activations(work: Workload) -> int:
    """Bytes that autograd keeps between the last layer and the loss, the head's copy in bfloat16 among them."""
    M, C, V, a = work.tokens, work.model.hidden_size, work.model.vocab_size, work.value
    norm = 4 * M * (2 * C + 1)
    if is_chunked(work):
        return norm + 4 * M * C + 8
    copy = a * V * C if a == 2 else 0
    logits = a * M * V + 2 * 4 * M if work.compiled else 4 * M * V
    return norm + a * M * C + copy + logits + 4 + distribution(work)


def distribution(work: Workload) -> int:
    """Bytes that autograd keeps of the divergence from a teacher."""
    if not work.teacher:
        return 0
    M, rows = work.tokens, min(work.model.vocab_size, work.teacher.vocab_size)
    if work.compiled:
        return work.value * M * rows + 2 * 4 * M
    again = work.tempered or rows < work.model.vocab_size
    return 4 * M * rows * (2 if again else 1) + M + 8


def teacher_bytes(work: Workload) -> int:
    """Bytes of the model to learn from."""
    if not work.teacher:
        return 0
    c, a = work.teacher, work.value
    table, projections = c.vocab_size * c.hidden_size, c.num_hidden_layers * projection_parameters(c)
    rest = meta_model(c).num_parameters() - projections
    return 4 * rest + (a if c.quantizer == "none" else 4) * projections + (a * table if a == 2 else 0)


def is_chunked(work: Workload) -> bool:
    return 0 < work.loss_chunk < work.tokens


def saved_bytes(work: Workload) -> int:
    """Bytes that autograd keeps of a whole forward pass: exact in eager mode, of a compiled model what was seen."""
    L = work.model.num_hidden_layers
    if work.recompute:
        mask = work.tokens * work.window if work.masked else 0  # one for all layers, of bools
        return L * layer_input(work) + mask + head_activations(work)
    return L * (layer_activations(work) + layer_weights(work)) + head_activations(work)


def layer_weights(work: Workload) -> int:
    """Bytes of the W~ that a layer keeps for its backward."""
    return work.value * projection_parameters(work.model) if work.copies_weights else 0


def projection_parameters(c: ModelConfig) -> int:
    """Parameters of the seven projections of a layer."""
    return sum(N * K for N, K in c.projections().values())


def estimate(work: Workload) -> Estimate:
    """The parts of one process at the peak of a run, which is at a step after the first one."""
    if work.lora:
        return estimate_adapters(work)
    phases = [work]
    if work.float_start:
        phases.append(replace(work, model=work.model.replace(quantizer="none"), int8=False))
    if work.ramp:
        phases.append(replace(work, int8=False))
    model = meta_model(work.model)
    matrices = [layer.weight.numel() for _, layer in bit_linears(model)]
    found = []
    for phase in phases:
        constant = constant_parts(phase, model.num_parameters(), sum(matrices))
        step = StepSizes(phase, model.num_parameters(), max(matrices))
        for moment, parts in MOMENTS.items():
            passing = parts(step)
            passing["gaps in the heap"] = GAPS * sum(passing.values()) if work.stays_in_heap else 0.0
            found.append(Estimate(constant | passing | {PROCESS_PART: PROCESS[work.compiled]}, moment, phase))
    if work.layer_steps:
        found.append(at_the_start(work, model.num_parameters()))
    return max(found, key=lambda each: each.total)


def at_the_start(work: Workload, P: int) -> Estimate:
    """In the layer-wise start: hidden states of N tokens, into and out of a layer in float and quantized, 16 N C (and
    N T of masks); of one layer of P' parameters the float copy, two saved forms, gradients and moments, 24 P', and what
    a step of M tokens keeps; of an input of K channels two Hessians and what GPTQ makes of them, 48 K^2."""
    c, layer = work.model, projection_parameters(work.model)
    N = max(2 * work.window, work.layer_tokens)
    step = replace(work, sequences=max(1, LAYER_STEP_TOKENS // work.window), int8=False)
    widest = max(K for _, K in c.projections().values())
    parts = {
        "parameters": 4.0 * P,
        "teacher": float(teacher_bytes(work)),
        "hidden states of the tokens": 16.0 * N * c.hidden_size + (N * work.window if work.masked else 0),
        "the layer that learns": 24.0 * layer + layer_weights(step),
        "activations kept by layers": float(layer_activations(step)),
        "workspace": 48.0 * widest**2,
        PROCESS_PART: PROCESS[work.compiled],
    }
    return Estimate(parts, "the layer-wise start", work)


def adapter_parameters(c: ModelConfig, rank: int) -> int:
    """Parameters of the adapters of all layers."""
    return c.num_hidden_layers * sum(rank * (N + K) for N, K in c.projections().values())


def estimate_adapters(work: Workload) -> Estimate:
    """The same where adapters train: of a float layer's activations, with 4 M r for each projection's; and in a layer's
    backward one dequantized weight, 4 N K, and its codes."""
    c, M, L, adapters = work.model, work.tokens, work.model.num_hidden_layers, adapter_parameters(work.model, work.lora)
    sizes = [N * K for N, K in c.projections().values()]
    plain = replace(work, model=c.replace(quantizer="none"), int8=False, compiled=False)
    layer = layer_activations(plain) + 4 * M * work.lora * len(sizes)
    logits = 4 * min(M, work.loss_chunk or M) * c.vocab_size
    constant = {
        "frozen model": work.frozen,
        "its codes as the kernels read them": L * sum(sizes) * PACKED_BITS.get(c.quantizer, 0) / 8,
        "adapters": 4 * adapters,
        "optimizer moments": 8 * adapters,
        "gradients": 4 * adapters,
        "activations kept by layers": L * layer_input(work) + layer if work.recompute else L * layer,
        PROCESS_PART: PROCESS[False],
    }
    loss = {"final norm and loss": head_activations(plain), "workspace": 2 * logits}
    last = {"workspace": 16 * M * c.intermediate_size + 5 * max(sizes)}
    moment, parts = max((("the loss", loss), ("the last layer", last)), key=lambda each: sum(each[1].values()))
    return Estimate(constant | parts, moment, work)


def constant_parts(work: Workload, P: int, projections: int) -> dict[str, float]:
    """What is there throughout a step: bytes by name."""
    c, sharded = work.model, work.strategy == "fsdp"
    slots = 4 * projections + 8 * (P - projections) if work.optimizer == "muon" else 8 * P
    ends = 4 * c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return {
        "parameters": 4 * P / work.owners,
        "optimizer moments": slots / work.owners,
        "int8 codes of the weights": projections if work.int8 else 0,
        "int8 codes for the statistics": projections / work.owners if work.quantized else 0,
        "parameters gathered": ends + 2 * (4 * P - ends) / c.num_hidden_layers if sharded else 0,
        "checkpoint being written": (4 * P + slots) / work.owners if work.async_save else 0,
        "weights kept while steps are timed": 4 * P / work.owners if work.timed else 0,
        "teacher": teacher_bytes(work),
    }


@dataclass(frozen=True)
class StepSizes:
    """Bytes that the moments of a step share."""

    work: Workload
    parameters: int
    """P."""
    largest: int
    """Values of the largest projection."""

    @property
    def embedding(self) -> int:
        """4 V C."""
        return 4 * self.work.model.vocab_size * self.work.model.hidden_size

    @property
    def gradients(self) -> float:
        """4 P / W: all that a process owns."""
        return 4 * self.parameters / self.work.owners

    @property
    def layer_gradients(self) -> float:
        """4 P without embedding and head, over L."""
        tables = self.embedding * (1 if self.work.model.tie_word_embeddings else 2)
        return (4 * self.parameters - tables) / self.work.model.num_hidden_layers

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there from the start of a backward: DDP's buckets, or an earlier micro-batch's."""
        return self.work.strategy == "ddp" or self.work.micro_batches > 1

    @property
    def arriving(self) -> float:
        """A layer's gradients beside those that they are added to; FSDP sends a copy, in any case."""
        if self.work.strategy == "fsdp":
            return self.layer_gradients * (1 + self.work.reduced / 4)
        return self.layer_gradients if self.keeps_gradients else 0

    @property
    def waiting(self) -> int:
        """4 V C of a tied embedding, whose gradient from the head waits for its second half."""
        return self.embedding if self.work.model.tie_word_embeddings and self.keeps_gradients else 0

    @property
    def kept(self) -> int:
        """Activations that the layers keep for the backward: all of them, or with `recompute` their inputs."""
        each = layer_input(self.work) if self.work.recompute else layer_activations(self.work)
        return self.work.model.num_hidden_layers * each

    @property
    def kept_weights(self) -> int:
        """W~ that the layers keep for the backward."""
        return 0 if self.work.recompute else self.work.model.num_hidden_layers * layer_weights(self.work)

    @property
    def recomputed(self) -> int:
        """With `recompute` everything of the one layer that is run again."""
        return layer_activations(self.work) + layer_weights(self.work) if self.work.recompute else 0

    @property
    def inside_layer(self) -> int:
        """Gradients of activations while a layer goes backward: four of 4 M F, or one in a compiled layer."""
        return (1 if self.work.compiled else 4) * 4 * self.work.tokens * self.work.model.intermediate_size


def at_the_loss(step: StepSizes) -> dict[str, float]:
    """In the backward of the loss all activations are there, and no gradient of this micro-batch.

    The gradient of the logits (of a M V bytes compiled, else 4 M V) takes their place, in a compiled loss from the
    start, otherwise beside them: 2 * 4 M V. Then comes the head's, 4 V C; of a chunk, beside that of the chunks before
    (2 * 4 V C) and its logits, which are made again.
    """
    work = step.work
    tokens = min(work.tokens, work.loss_chunk or work.tokens)
    logits = (work.value if work.compiled else 4) * tokens * work.model.vocab_size
    workspace = step.embedding * (2 if is_chunked(work) else 1)
    if not work.compiled:
        workspace = max(workspace, (5 if work.teacher else 2) * logits)
    if is_chunked(work):
        workspace += logits
    return {
        "gradients": step.gradients if step.keeps_gradients else 0,
        "quantized weights kept by layers": step.kept_weights,
        "activations kept by layers": step.kept,
        "final norm and loss": head_activations(work),
        "teacher's hidden states": 4 * work.tokens * work.teacher.hidden_size if work.teacher else 0,
        "workspace": workspace,
    }


def at_the_last_layer(step: StepSizes) -> dict[str, float]:
    """In the backward of the layer next to the loss: L layers of activations, gradients of the head and of one layer.

    kept + recomputed + inside_layer + (4 V C + layer_gradients) / W, or all gradients where they are kept
    """
    one = (step.embedding + step.layer_gradients) / step.work.owners
    return {
        "gradients": step.gradients if step.keeps_gradients else one,
        "quantized weights kept by layers": step.kept_weights,
        "activations kept by layers": step.kept + step.recomputed,
        "workspace": step.inside_layer + step.arriving + step.waiting,
    }


def at_the_first_layer(step: StepSizes) -> dict[str, float]:
    """In the backward of the layer next to the embedding: its own activations, and all gradients.

    kept / L + recomputed + inside_layer + gradients
    """
    L = step.work.model.num_hidden_layers
    return {
        "gradients": step.gradients,
        "quantized weights kept by layers": step.kept_weights / L,
        "activations kept by layers": step.kept / L + step.recomputed,
        "workspace": step.inside_layer + step.arriving + step.waiting,
    }


def at_the_embedding(step: StepSizes) -> dict[str, float]:
    """In the backward of the embedding: its gradient beside the head's where they are tied, and the upstream one.

    gradients + 4 V C (tied) + 4 V C (waiting) + 4 M C + 4 V C (what FSDP sends; 2 V C in bfloat16)
    """
    work = step.work
    tied = step.embedding if work.model.tie_word_embeddings else 0
    sent = step.embedding * work.reduced / 4 if work.strategy == "fsdp" else 0
    return {
        "gradients": step.gradients,
        "workspace": tied + step.waiting + 4 * work.tokens * work.model.hidden_size + sent,
    }


def at_the_optimizer(step: StepSizes) -> dict[str, float]:
    """In the update: gradients, and of Muon its iteration on the largest matrix, of N K values.

    12 N K, or with FSDP 8 N K and all updates in bfloat16, sent, received and answered: 6 P' / W
    """
    work, muon = step.work, 12.0 * step.largest
    if work.strategy == "fsdp":
        muon = 8 * step.largest + 6 * work.model.num_hidden_layers * projection_parameters(work.model) / work.owners
    return {"gradients": step.gradients, "workspace": muon if work.optimizer == "muon" else 0}


MOMENTS: dict[str, Callable[[StepSizes], dict[str, float]]] = {
    "the loss": at_the_loss,
    "the last layer": at_the_last_layer,
    "the first layer": at_the_first_layer,
    "the embedding": at_the_embedding,
    "the optimizer": at_the_optimizer,
}
"""What is there beside `constant_parts`, bytes by name, at the moments that may be the peak of a step."""
