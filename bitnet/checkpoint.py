"""Run folders and checkpoints: safetensors files, written so that no crash can lose the previous one.

    runs/NAME/
      config.json              the whole training configuration
      metrics.jsonl  loss.png
      checkpoints/
        step-00000500/         model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer.model (or
                               another tokenizer's files), chat_template.jinja where the model has one, checksums.json;
                               of a sharded run shards/ (bitnet/sharded.py) for the safetensors
        index.json             {"last": "step-00000500", "best": "step-00000400", "kept": ["step-00000500", ...]}

A checkpoint is written into a folder of another name, flushed to disk and renamed; then `index.json` is replaced; only
then are the checkpoints removed that it no longer names. At every moment `index.json` points at complete checkpoints.
Nothing is pickled, so loading a checkpoint runs no code. `newest_good` checks the sums before a run goes on from one.

A packed model (`save_packed`) is a folder of its own with model.safetensors, config.json and tokenizer.model, where
config.json says `"packed": true` and the tensors are those of `BitNetForCausalLM.pack()`, with an INT8 or a float
embedding.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitnet.distributed import World, placed_like
from bitnet.engine import Engine
from bitnet.files import fsync_folder, write_atomic
from bitnet.gpu_engine import GpuEngine
from bitnet.kernels import native_wanted, quantize_weight, triton_wanted
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.quant import pack_codes

INDEX, CHECKSUMS, SHARDS = "index.json", "checksums.json", "shards"
MODEL, OPTIMIZER, STATE, CONFIG, TOKENIZER = (
    "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.model",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or made for another model; the message says which and what to do."""


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a run or checkpoint of this project?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object; it is not a file of this project")
    return value


def save_checkpoint(
    run: Path,
    *,
    model: BitNetForCausalLM | Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer: bytes | Mapping[str, bytes],
    best: bool,
    keep: int = 1,
    world: World | None = None,
) -> Path:
    """Write a checkpoint, make it the run's last one, and its best one if `best`; returns its folder.

    `model` may be its state_dict; `state` must hold the step under "step"; `tokenizer` is a sentencepiece .model, or
    files by name. The `keep` newest checkpoints stay, and the best one. `world` are the processes over which the model
    is sharded, each of which must call this; without one the model is whole. Raises OSError (disk full, no permission)
    with the earlier checkpoints untouched and nothing half-written left behind.
    """
    folder = run / "checkpoints" / f"step-{state['step']:08d}"
    pid = world.share(os.getpid()) if world else os.getpid()
    temporary = folder.with_name(f".{folder.name}.tmp-{pid}")
    index = _read_index(run)
    weights = model if isinstance(model, Mapping) else model.state_dict()

    def prepare() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for remains in folder.parent.glob(
            ".step-*.tmp-*"
        ):  # of a save that was killed; they may be what fills the disk
            shutil.rmtree(remains, ignore_errors=True)
        if folder.name not in _named(index):  # else this very step is already saved and only its rank may change
            temporary.mkdir()

    def write_rest() -> None:
        write_atomic(temporary / STATE, json.dumps(state, indent=1))
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        for name, content in _tokenizer_files(tokenizer):
            write_atomic(temporary / name, content)
        write_atomic(temporary / CHECKSUMS, json.dumps(_checksums(temporary), indent=1))
        fsync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # left by a crash between the next line and the index
        os.replace(temporary, folder)
        fsync_folder(folder.parent)

    def publish() -> None:
        index["last"] = folder.name
        index["kept"] = [folder.name, *(name for name in index.get("kept", []) if name != folder.name)][:keep]
        if best or "best" not in index:
            index["best"] = folder.name
        write_atomic(folder.parent / INDEX, json.dumps(index))
        fsync_folder(folder.parent)

    try:
        _on_first(world, prepare)
        if folder.name not in _named(index):
            if world:
                from bitnet.sharded import write_shards

                tensors = {f"optimizer.{name}": value for name, value in optimizer_state.items()}
                tensors |= {f"model.{name}": value for name, value in weights.items()}
                write_shards(temporary / SHARDS, tensors, world.group)
            else:
                # Tied tensors appear once: the head of a tied model is no module of its own.
                save_tensors(temporary / MODEL, {k: v.detach() for k, v in weights.items()})
                save_tensors(temporary / OPTIMIZER, optimizer_state)
            _on_first(world, write_rest)
        _on_first(world, publish)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint of step {state['step']} was not written to {folder.parent}: {error}") from error
    if world is None or world.is_first:
        for other in folder.parent.iterdir():
            if other.is_dir() and other.name not in _named(index):
                shutil.rmtree(other, ignore_errors=True)
    return folder


def _on_first(world: World | None, action: Callable[[], None]) -> None:
    """Run on the first process only; what it raises, all raise."""
    error: Exception | None = None
    if world is None or world.is_first:
        try:
            action()
        except (OSError, SafetensorError) as problem:
            error = problem
    failure = world.share(error and str(error)) if world else None
    if error or failure:
        raise error or OSError(failure)


def _named(index: dict[str, Any]) -> set[str]:
    return {name for name in (index.get("last"), index.get("best"), *index.get("kept", [])) if name}


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS):
        with open(path, "rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None: a sum that differs, a file that is missing. One written
    without sums counts as good where its model can be opened."""
    try:
        if not (folder / CHECKSUMS).is_file():
            load_tensors(folder / MODEL)
            return None
        for name, expected in load_json(folder / CHECKSUMS).items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} is not what was written"
    except (OSError, CheckpointError) as error:
        return str(error)
    return None


def newest_good(run: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run whose files are whole, and for each newer one a line about what is lost with it.

    Raises CheckpointError where there is none.
    """
    index = _read_index(run)
    if not _named(index):
        resolve(run)  # says what is missing
    lost: list[str] = []
    for name in sorted(_named(index), reverse=True):
        problem = damage(run / "checkpoints" / name)
        if problem is None:
            return run / "checkpoints" / name, lost
        lost.append(f"checkpoint {name} is damaged ({problem}), and the steps since the one before it are lost")
    raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(lost)}; start the run anew")


def consolidate(folder: Path) -> Path:
    """Write the safetensors form of a sharded checkpoint beside its shards, in one process, and return the model's
    file. Raises CheckpointError for damaged shards and OSError for a disk that is full."""
    from bitnet.sharded import read_whole

    try:
        for name, prefix in ((OPTIMIZER, "optimizer."), (MODEL, "model.")):  # with the model's file it is complete
            temporary = folder / f".{name}.tmp-{os.getpid()}"
            save_tensors(temporary, read_whole(folder / SHARDS, prefix))
            os.replace(temporary, folder / name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    fsync_folder(folder)
    return folder / MODEL


def load_training_tensors(
    folder: Path, model: BitNetForCausalLM, optimizer: Any, device: torch.device | str = "cpu"
) -> None:
    """Fill a model and its optimizer, whole or sharded, from a checkpoint of either form.

    `optimizer` is a `bitnet.optim.Optimizer`. Raises CheckpointError for damaged files or another model's.
    """
    if not (folder / SHARDS).is_dir():
        load_weights(model, folder / MODEL, device)
        optimizer.load_state(load_tensors(folder / OPTIMIZER))
        return
    from bitnet.sharded import names_and_shapes, read_shards

    parameters = dict(model.named_parameters())
    wanted = {f"model.{name}": value for name, value in model.state_dict().items()}
    try:
        shapes = names_and_shapes(folder / SHARDS)
        moments: dict[str, Tensor] = {}
        for key, size in shapes.items():
            if not key.startswith("optimizer."):
                continue
            name = key.removeprefix("optimizer.").rpartition(".")[0]
            if name not in parameters:
                raise ValueError(f"optimizer state {key!r} belongs to no parameter of this model")
            moments[key] = torch.zeros_like(parameters[name].detach()) if len(size) else torch.zeros(())
        found = {name: size for name, size in shapes.items() if name.startswith("model.")}
        if found != {name: value.shape for name, value in wanted.items()}:
            raise ValueError(f"the shards in {folder} do not fit the model's configuration")
        read_shards(folder / SHARDS, wanted | moments)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    optimizer.load_state({key.removeprefix("optimizer."): value for key, value in moments.items()})


def resolve(path: str | Path, which: str = "last") -> Path:
    """The checkpoint folder meant by a path: a checkpoint itself, or a run, of which `which` is last or best.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / MODEL).is_file():
        return path
    if (path / SHARDS).is_dir():
        raise _not_converted(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a run folder made by train.py or one of its checkpoints")
    folder = folder_of(path, which)
    if (folder / SHARDS).is_dir() and not (folder / MODEL).is_file():
        raise _not_converted(folder)
    if not (folder / MODEL).is_file():
        raise CheckpointError(f"{path} names {folder.name} as its {which} checkpoint, but {MODEL} is missing there")
    return folder


def folder_of(run: Path, which: str) -> Path:
    """The folder that a run's index names as last or best. Raises CheckpointError where it names none."""
    name = _read_index(run).get(which)
    if name is None:
        raise CheckpointError(f"{run} holds no checkpoint; train one with: python train.py --out {run}")
    return run / "checkpoints" / name


def _not_converted(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is sharded; write its safetensors form with: python -m bitnet.sharded {folder.parent.parent}"
    )


@contextmanager
def open_tensors(path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    """A safetensors file, of which nothing but the header is read by itself. Raises CheckpointError for a truncated or
    foreign file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; is {path.parent} a checkpoint of this project?") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it was truncated or is of another format. "
            "Use another checkpoint of the run"
        ) from error


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError as `open_tensors` does."""
    with open_tensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def load_model(checkpoint: Path, device: torch.device | str = "cpu", quantizer: str | None = None) -> BitNetForCausalLM:
    """The model of a checkpoint folder, in float32 and evaluation mode.

    `quantizer` loads the same latent weights under another weight quantizer. Raises CheckpointError for a damaged file
    or tensors that do not fit the configuration, before anything of the configuration's sizes is made.
    """
    config, packed = load_config(checkpoint)
    if packed:
        raise CheckpointError(f"{checkpoint} holds packed weights and no latent floats; give the run it was made from")
    if quantizer is not None:
        config = config.replace(quantizer=quantizer)
    path = checkpoint / MODEL
    with open_tensors(path, device) as file:
        names = list(file.keys())
        check_layers(path, config, names)
        _check_fit(path, config, file)
        tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    return BitNetForCausalLM.from_tensors(config, tensors)


def check_layers(path: Path, config: ModelConfig, names: Iterable[str]) -> None:
    """Raise CheckpointError where a file does not have tensors of every layer, before as many layers are made."""
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    if config.num_hidden_layers > len(layers):
        raise CheckpointError(
            f"{path} does not fit the model's configuration: that says {config.num_hidden_layers} layers, and the file "
            f"has tensors of {len(layers)}"
        )


def load_config(checkpoint: Path) -> tuple[ModelConfig, bool]:
    """The model's shape, and whether the folder holds packed weights. Raises CheckpointError for a damaged file."""
    config = load_json(checkpoint / CONFIG)
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{checkpoint / CONFIG} has no 'model' section; it is not a checkpoint of this project")
    try:
        return ModelConfig.from_dict(config["model"]), bool(config.get("packed"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / CONFIG}: {error}") from error


def save_packed(folder: Path, model: BitNetForCausalLM, tokenizer: bytes | Mapping[str, bytes]) -> None:
    """Write a packed model and its tokenizer (a sentencepiece .model, or files by name), whole or not at all.

    Raises OSError, also for a folder that exists.
    """
    if not model.is_packed:
        raise ValueError("the model is not packed; call model.pack() first")
    with new_folder(folder, "packed model") as temporary:
        save_tensors(temporary / MODEL, dict(model.state_dict()))
        config = {"packed": True, "model": dataclasses.asdict(model.config)}
        write_atomic(temporary / CONFIG, json.dumps(config, indent=1))
        for name, content in _tokenizer_files(tokenizer):
            write_atomic(temporary / name, content)


def _tokenizer_files(tokenizer: bytes | Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    yield from ({TOKENIZER: tokenizer} if isinstance(tokenizer, bytes) else tokenizer).items()


@contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which then appears under its name whole, or not at all. Raises OSError, naming `what` was to
    be written, also for a folder that exists."""
    if folder.exists():
        raise OSError(f"{folder} already exists; choose another name or delete it")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
        fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the {what} was not written to {folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_for_inference(
    checkpoint: Path, device: torch.device | str = "cpu", *, cache_dtype: str = "float32"
) -> BitNetForCausalLM | Engine | GpuEngine:
    """The packed model of a checkpoint or packed folder, on the backend in force (`bitnet.kernels`): the native engine
    on a CPU that has it, the Triton engine on a GPU that has it, else packed layers in torch.

    `cache_dtype` (float32, float16, int8) is the native engine's; the torch model keeps float32. Raises
    CheckpointError for a damaged file and ValueError for a float twin, which has no packed form.
    """
    device = torch.device(device)
    config, packed = load_config(checkpoint)
    if config.quantizer == "none":
        raise ValueError(f"{checkpoint} is a float model, which has no packed form; generate with --no-pack")
    native = native_wanted(device)
    if not packed:
        return engine_of(load_model(checkpoint, "cpu" if native else device).pack(), device, cache_dtype)
    if not native:
        return engine_of(load_packed(checkpoint, device), device, cache_dtype)
    path = checkpoint / MODEL

    def read(name: str) -> Tensor:  # a mapping of its own for each, so that no more of the file stays resident
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        return Engine(config, *_with_packed_embeddings(read, names), cache_dtype=cache_dtype)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold the packed model of its {CONFIG}: {error}") from error


def load_packed(folder: Path, device: torch.device | str = "cpu") -> BitNetForCausalLM:
    """The packed model of a folder, its embedding and head as they are stored. Raises CheckpointError for a damaged
    file or tensors that do not fit the configuration."""
    config, _ = load_config(folder)
    try:
        model = BitNetForCausalLM.from_tensors(config, load_tensors(folder / MODEL, device))
    except ValueError as error:
        raise CheckpointError(f"{folder / MODEL} does not hold the packed model of its {CONFIG}: {error}") from error
    if not model.is_packed:
        raise CheckpointError(f"{folder / MODEL} holds floats, and its {CONFIG} says that they are packed")
    return model


def engine_of(
    model: BitNetForCausalLM, device: torch.device, cache_dtype: str = "float32"
) -> BitNetForCausalLM | Engine | GpuEngine:
    """A packed model as the backend in force runs it on a device: an engine where there is one, else torch."""
    if native_wanted(device):
        return Engine.from_model(model.pack(), cache_dtype=cache_dtype)
    if triton_wanted(device):
        return GpuEngine.from_model(model.to(device).pack(), device=device)
    return model.to(device)


def _with_packed_embeddings(
    read: Callable[[str], Tensor], names: list[str]
) -> tuple[Callable[[str], Tensor], list[str]]:
    """A packed model's tensors with the matrices that are float, embedding and head, quantized to INT8 as they are
    read; in a file that holds them in INT8 nothing changes."""
    floats = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in names]
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        module = name.rpartition(".")[0]
        if f"{module}.weight" not in floats:
            return read(name)
        if name not in made:
            codes, scale = quantize_weight(read(f"{module}.weight"), "int8")
            made.update({f"{module}.packed_weight": pack_codes(codes, 8), f"{module}.weight_scale": scale})
        return made.pop(name)

    for name in floats:
        module = name.rpartition(".")[0]
        names = [*(n for n in names if n != name), f"{module}.packed_weight", f"{module}.weight_scale"]
    return tensor, names


def load_weights(model: BitNetForCausalLM, path: Path, device: torch.device | str = "cpu") -> None:
    """Copy the tensors of a file into a model, every one of them and no other. Raises CheckpointError otherwise."""
    with open_tensors(path, device) as file:
        _check_fit(path, model.config, file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    whole = model.state_dict()
    model.load_state_dict({name: placed_like(whole[name], value) for name, value in tensors.items()})


def _check_fit(path: Path, config: ModelConfig, file: Any) -> None:
    """Raise CheckpointError unless a safetensors file has floats of the shapes of the model's tensors, every one of
    them and no other."""
    expected = {name: list(shape) for name, shape in config.tensor_shapes().items()}
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    found = {name: list(value.get_shape()) for name, value in slices.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = "; ".join(
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}" for name in wrong[:3]
        )
        raise CheckpointError(f"{path} does not fit the model's configuration at {len(wrong)} tensors ({detail})")
    for name, value in slices.items():
        if value.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"{path}: {name} is {value.get_dtype()}, not a float; it is damaged")


def _read_index(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / INDEX
    return load_json(path) if path.exists() else {}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, flushed to disk."""
    # The metadata is what transformers asks of a file before it reads it.
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
