"""Ternary models in vLLM beside this project's engine: texts, predictions, processes, and what is refused at start.

Run by `make vllm`. Random models; a start of vLLM takes most of the time, so all of them run in one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet import kernels
from bitnet.inference.generation import generate
from bitnet.inference.loading import open_model
from bitnet.inference.options import SamplingConfig
from bitnet.model import BitNetForCausalLM, ModelConfig
from bitnet.model.config import PRESETS
from bitnet.storage.hf.write import write
from bitnet.storage.source import open_source

if not os.environ.get("BITNET_VLLM_TESTS"):
    pytest.skip("vLLM has an environment of its own: make vllm", allow_module_level=True)

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
LLAMA = SMALL.replace(sub_norm=False)
# Name: the model and the form of its folder.
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "bitnet": (SMALL, "packed"),
    "bitnet, relu2, untied": (SMALL.replace(hidden_act="relu2", tie_word_embeddings=False), "packed-inverse"),
    "bitnet, latent floats": (SMALL, "master"),
    "llama": (LLAMA, "packed-inverse"),
    "qwen2": (LLAMA.replace(qkv_bias=True), "packed"),
    "qwen3": (LLAMA.replace(qk_norm=True, head_dim=96), "packed"),
}
TWO_PROCESSES = ("bitnet", "bitnet, latent floats", "qwen2")
if os.environ.get("BITNET_LONG") == "1":
    MODELS["2b-4t, 4 layers"] = (PRESETS["2b-4t"].replace(num_hidden_layers=4), "packed")
PROMPTS, TOKENS, NEW = 20, 101, 64
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown choice": ({"additional_config": {"bitnet": {"embedings": "int8"}}}, "it may hold embeddings"),
    "LoRA over processes": ({"enable_lora": True, "tensor_parallel_size": 2}, "tensor-parallel-size 1"),
}


def random_model(config: ModelConfig) -> BitNetForCausalLM:
    torch.manual_seed(0)
    model = BitNetForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SMALL.vocab_size, (PROMPTS, TOKENS), generator=generator).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: root / str(index) for index, name in enumerate(MODELS)}
    for name, (config, form) in MODELS.items():
        write(random_model(config), found[name], form)
    return found


@pytest.fixture(scope="module")
def in_vllm(folders, prompts, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What vLLM made of every model, by its name, of some in "NAME in two", and of what it must refuse."""
    folder = tmp_path_factory.mktemp("vllm")
    over_two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    wanted: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MODELS}
    wanted |= {f"{name} in two": (name, over_two) for name in TWO_PROCESSES}
    wanted |= {name: ("bitnet", over_two | options) for name, (options, _) in REFUSED.items()}
    jobs = [
        {"model": str(folders[model]), "prompts": prompts, "new_tokens": NEW, "options": options}
        for model, options in wanted.values()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [sys.executable, Path(__file__).with_name("in_vllm.py"), folder / "jobs.json", folder / "out.json"]
    # Each process of two on a core of its own; on one machine of several sockets vLLM would choose.
    cores = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores}
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    return dict(zip(wanted, json.loads((folder / "out.json").read_text()), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_texts_and_predictions_are_those_of_our_engine(name, folders, prompts, in_vllm):
    """Two backends of ours round some activation to different codes, and so does vLLM: where the likeliest token is
    another one, it is one between which our own backends do not tell apart."""
    source, found = open_source(str(folders[name])), in_vllm[name]
    assert "refused" not in found, found
    engine = open_model(source)
    logits = engine(torch.tensor(prompts))[:, :-1]
    with torch.no_grad(), kernels.use_backend("reference"):
        noise = 2 * float((source.model().pack()(torch.tensor(prompts))[:, :-1] - logits).abs().max())
    positions = [position for row in found["positions"] for position in row]
    assert len(positions) == PROMPTS * (TOKENS - 1)
    equal = 0
    for position, row in zip(positions, logits.flatten(0, 1), strict=True):
        theirs = int(max(position, key=position.get))
        assert row.max() - row[theirs] <= noise
        equal += theirs == int(row.argmax())
    assert equal >= 0.98 * len(positions)
    ids = generate(engine, prompts, max_new_tokens=NEW, sampling=SamplingConfig(temperature=0), seed=0)
    for prompt, theirs, ours in zip(prompts, found["texts"], torch.stack(list(ids), 1).tolist(), strict=True):
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b), None)
        if at is not None:
            row = engine(torch.tensor([prompt + ours[:at]]), last_only=True)[0, -1]
            assert row.max() - row[theirs[at]] <= noise


@pytest.mark.parametrize("name", [name for name in MODELS if not MODELS[name][0].sub_norm])
def test_without_sub_norms_texts_and_predictions_are_equal(name, folders, prompts, in_vllm):
    engine, found = open_model(open_source(str(folders[name]))), in_vllm[name]
    rows = engine(torch.tensor(prompts))[:, :-1].argmax(-1).flatten().tolist()
    positions = [position for row in found["positions"] for position in row]
    equal = sum(str(id) == max(position, key=position.get) for id, position in zip(rows, positions, strict=True))
    assert equal >= 0.999 * len(rows)
    ids = generate(engine, prompts, max_new_tokens=NEW, sampling=SamplingConfig(temperature=0), seed=0)
    assert found["texts"] == torch.stack(list(ids), 1).tolist()


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_give_the_bits_of_one(name, in_vllm):
    assert in_vllm[f"{name} in two"] == in_vllm[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_right_is_refused_at_start(name, in_vllm):
    assert REFUSED[name][1] in in_vllm[name].get("refused", "")
