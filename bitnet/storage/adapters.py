"""LoRA adapters on disk: a small folder in PEFT's form, with a note of the model that it belongs to.

    adapter_config.json         r, lora_alpha, target_modules, base_model_name_or_path: what PEFT reads
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight float32 [r, K], .lora_B.weight [N, r]
    adapter_base.json           {"name": of the base, "fingerprint": of its weights (bitnet/model/lora.py)}
    checksums.json

A checkpoint of a run with `--lora` holds the first and the third beside its tensors, and is read like such a folder. An
adapter that PEFT trained has no fingerprint: its shapes must fit, and whether the base is the right one cannot be told.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitnet.console import note
from bitnet.files import JsonObject, is_plain_file, new_folder, write_atomic
from bitnet.model import BitNetForCausalLM
from bitnet.model.lora import Matrices, check_matrices, fingerprint, matrices_of, projections
from bitnet.storage.checksums import write_sums
from bitnet.storage.folders import resolve
from bitnet.storage.foreign import ADAPTER, ADAPTER_BASE
from bitnet.storage.json_files import CheckpointError, load_json
from bitnet.storage.safetensors import MODEL, load_tensors, save_tensors

CONFIG, WEIGHTS, PICKLED = ADAPTER
_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, or that change nothing in what trained matrices compute.
_HARMLESS = frozenset((
    "r", "lora_alpha", "base_model_name_or_path", "task_type", "inference_mode", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "revision", "auto_mapping", "peft_version",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "qalora_group_size",
    "runtime_config",
))  # fmt: skip
# Values of the others with which an adapter is plain LoRA on the base as it is. Some ways to begin change the base too.
_NEUTRAL: JsonObject = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A difference to a model, by the names of its projections."""

    matrices: Matrices
    path: Path
    base: str
    """What its base was called where it was trained."""
    fingerprint: str | None = None
    """Of its base; None where it says none."""

    def check(self, model: BitNetForCausalLM, name: object) -> None:
        """Raise ValueError unless this model, which `name` is, is the base."""
        layers = {each: (layer.out_features, layer.in_features) for each, layer in projections(model)}
        if self.fingerprint is not None and (found := fingerprint(model)) != self.fingerprint:
            raise ValueError(
                f"{self.path} is an adapter of {self.base} (weights {self.fingerprint[:12]}), and {name} has other "
                f"weights ({found[:12]}); give the model that it was trained on"
            )
        check_matrices(self.matrices, layers)
        if self.fingerprint is None:
            note(f"{self.path} says nothing of the weights of its base, {self.base}: that it is {name} cannot be told")


def base_files(name: str, weights: str, rank: int, alpha: float) -> dict[str, bytes]:
    """The JSON files of an adapter on the model of this name and fingerprint."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    about = {"name": name, "fingerprint": weights}
    return {CONFIG: json.dumps(config, indent=1).encode(), ADAPTER_BASE: json.dumps(about, indent=1).encode()}


def save_adapter(folder: Path, checkpoint: Path) -> None:
    """Write the adapter of a run's checkpoint, whole or not at all. Raises OSError, also for a folder that exists."""
    with new_folder(folder, "adapter") as temporary:
        for name in (CONFIG, ADAPTER_BASE):
            write_atomic(temporary / name, (checkpoint / name).read_bytes())
        tensors = load_tensors(checkpoint / MODEL)
        save_tensors(temporary / WEIGHTS, {f"{_PREFIX}{name}.weight": value for name, value in tensors.items()})
        write_sums(temporary)


def load_adapter(path: str | Path) -> Adapter:
    """The adapter of a folder, or of a run with `--lora`, its best checkpoint. Raises CheckpointError for what is none,
    is damaged, or computes something else than plain LoRA on the projections."""
    folder = Path(path)
    if not (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        folder = resolve(folder, "best")
    if not is_plain_file(folder / CONFIG):
        raise CheckpointError(f"{path} holds no {CONFIG}; give the folder of a LoRA adapter, or a run with --lora")
    config = load_json(folder / CONFIG)
    for name, value in config.items():
        if name not in _HARMLESS and value not in (None, *_NEUTRAL.get(name, (False, {}, []))):
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {value!r:.60}, and only plain LoRA is computed here; merge the adapter "
                "with peft"
            )
    alpha, about = config.get("lora_alpha"), {}
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise CheckpointError(f"{folder / CONFIG}: lora_alpha is {alpha!r:.60}; it must be a number above 0")
    if is_plain_file(folder / ADAPTER_BASE):
        about = load_json(folder / ADAPTER_BASE)
    base, weights = about.get("name", config.get("base_model_name_or_path")), about.get("fingerprint")
    if weights is not None and not isinstance(weights, str):
        raise CheckpointError(f"{folder / ADAPTER_BASE}: fingerprint is {weights!r:.60}; the file is damaged")
    file = folder / WEIGHTS
    if not file.exists() and (folder / PICKLED).exists():
        raise CheckpointError(
            f"{folder} holds its matrices in {PICKLED} (pickled PyTorch), which is not read here; save it anew with "
            "peft, which writes safetensors"
        )
    tensors = load_tensors(file if file.exists() else folder / MODEL)
    try:
        matrices = matrices_of({_own_name(key): value for key, value in tensors.items()}, float(alpha))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for name, (down, _) in matrices.items():
        if len(down) != (rank := config.get("r", len(down))):  # by which peft would divide alpha
            raise CheckpointError(f"{folder / CONFIG}: r is {rank!r:.60} and lora_A of {name} has {len(down)} rows")
    _check_finite(folder, tensors)
    return Adapter(matrices, Path(path), str(base), weights)


def _own_name(key: str) -> str:
    name = key.removeprefix(_PREFIX).removesuffix(".weight")
    if not name.endswith((".lora_A", ".lora_B")):
        raise ValueError(f"{key} is no matrix of a LoRA adapter on a projection; merge the adapter with peft")
    return name


def _check_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise CheckpointError(f"{folder}: {name} holds values that are no finite floats; the file is damaged")
