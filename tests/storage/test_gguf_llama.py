"""Our GGUF files in llama.cpp and transformers: the same tokens, the same logits."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitnet.data.corpus import open_corpus
from bitnet.inference.loading import open_model
from bitnet.kernels import blocks
from bitnet.model import BitNetForCausalLM
from bitnet.ptq.methods import quantize_model
from bitnet.quant import quantize_ternary
from bitnet.quant.blocks import NEEDS_IMPORTANCE
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.gguf.container import GGUFFile
from bitnet.storage.gguf.write import FILE_TYPES
from bitnet.storage.source import open_source
from bitnet.tokenizer import Tokenizer
from bitnet.tokenizer.gguf_write import vocabulary
from tests import oracles
from tests.oracles.llama import LlamaModel, quantize
from tests.storage.builders import SHAPE, gguf_model
from tests.vocabularies import stdlib_tokenizer


def text(size: int) -> str:
    pieces, total = [], 0
    for document in open_corpus("stdlib").documents():
        pieces.append(document[:8000])
        total += len(pieces[-1])
        if total > size:
            break
    return "".join(pieces)[:size]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return stdlib_tokenizer(SHAPE.vocab_size)


def trained_model(tokenizer: Tokenizer, **changes: object) -> tuple[BitNetForCausalLM, torch.Tensor]:
    """A model after some steps on text, and sequences of that text."""
    torch.manual_seed(0)
    model = BitNetForCausalLM(SHAPE.replace(**changes))
    ids = tokenizer.encode(text(60_000))
    data = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for step in range(30):
        batch = data[torch.arange(8) + 8 * step % (len(data) - 8)]
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), data[:8]


@pytest.fixture(scope="module")
def ternary(tokenizer):
    return trained_model(tokenizer)


@pytest.fixture(scope="module")
def twin(tokenizer):
    return trained_model(tokenizer, quantizer="none")


# Vocabularies


TEXTS = [
    "", " ", "  ", "a", " a", "\n\n", "\tdef f(x):\n        return x  # why\n", "0123 45.6e-7", "naïve café — “ok”",
    "\U0001f600 \u4f60\u597d \u0416", "a\u0301", "<s> </s> <unk> <0x41>", "x" * 300, "end ", "\r\n", "\u00a0\u3000",
    "[PAD400]", "\x01\x7f", "\ufffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama_tokenizer(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "x.gguf"
    model = gguf_model(vocab_size=tokenizer.vocab_size + 5)
    gguf_write.write(model, path, "TQ2_0", tokenizer=tokenizer, chat_template="{{ messages }}", embedding_type="F16")
    with LlamaModel(path, 128) as loaded:
        yield loaded


def test_llama_cpp_tokenizes_as_we_do(tokenizer, llama_tokenizer):
    whole = text(150_000)
    for piece in [*TEXTS, *(whole[i : i + 3000] for i in range(0, len(whole), 3000))]:
        assert llama_tokenizer.tokenize(piece) == tokenizer.encode(piece), piece[:80]
        assert llama_tokenizer.tokenize(piece, special=True) == tokenizer.encode(piece, bos=True), piece[:80]
    assert llama_tokenizer.detokenize(tokenizer.encode(whole[:2000])) == whole[:2000]


def test_llama_cpp_sees_the_special_tokens_and_the_template(tokenizer, llama_tokenizer):
    assert llama_tokenizer.vocab_size == tokenizer.vocab_size + 5
    assert (llama_tokenizer.bos_id, llama_tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert llama_tokenizer.adds_bos
    assert llama_tokenizer.chat_template == "{{ messages }}"
    assert llama_tokenizer.tokenize("<s>", parse_special=True) == [tokenizer.bos_id]


def test_a_vocabulary_of_another_file_goes_through(tokenizer, tmp_path):
    gguf_write.write(gguf_model(), tmp_path / "a.gguf", "TQ2_0", tokenizer=tokenizer, embedding_type="F16")
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    gguf_write.write(gguf_model(), tmp_path / "b.gguf", "TQ2_0", tokenizer=metadata, embedding_type="F16")
    again = GGUFFile(tmp_path / "b.gguf").metadata
    assert {k: v for k, v in again.items() if k.startswith("tokenizer")} == vocabulary(metadata, 400)


def train_sentencepiece(**options: object) -> Tokenizer:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text(30_000).split("\n")), model_writer=model, vocab_size=350, minloglevel=3,
        num_threads=1, hard_vocab_limit=False, **{"model_type": "bpe", "normalization_rule_name": "identity",
        "byte_fallback": True, "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue())


def test_a_dummy_prefix_and_user_defined_pieces_are_told(tmp_path):
    tokenizer = train_sentencepiece(user_defined_symbols=["<|turn|>"])
    assert tokenizer.adds_space_prefix
    gguf_write.write(gguf_model(), tmp_path / "x.gguf", "TQ2_0", tokenizer=tokenizer, embedding_type="F16")
    metadata = GGUFFile(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    user = metadata["tokenizer.ggml.tokens"].index("<|turn|>")
    assert metadata["tokenizer.ggml.token_type"][user] == 4
    with LlamaModel(tmp_path / "x.gguf", 64) as loaded:
        for sample in ("def f(x):", " two  spaces", "x = 3\n"):
            assert loaded.tokenize(sample, special=True) == tokenizer.encode(sample, bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "not of byte-pair kind"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes its text"),
        ({"remove_extra_whitespaces": True}, "normalizes its text"),
        ({"byte_fallback": False}, "no byte pieces"),
    ],
)
def test_vocabularies_that_llama_cpp_would_run_differently_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vocabulary(train_sentencepiece(**options), 400)


def test_a_vocabulary_of_another_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match="400 tokens and the model 300 rows"):
        vocabulary(tokenizer, 300)
    with pytest.raises(ValueError, match=r"no tokenizer.ggml.tokens"):
        vocabulary({"general.name": "x"}, 300)


# llama.cpp and transformers


def compare(model: BitNetForCausalLM, data: torch.Tensor, path: Path) -> tuple[float, float]:
    """Share of positions with the same most probable token, and the ratio of the perplexities minus 1."""
    with torch.no_grad():
        ours = model(data)
    with LlamaModel(path, 128) as loaded:
        theirs = torch.stack([torch.tensor(loaded.logits(row.tolist())) for row in data])
    losses = [cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten()) for logits in (ours, theirs)]
    return float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()), float((losses[1] - losses[0]).exp()) - 1


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
def test_llama_cpp_runs_a_ternary_model(tmp_path, ternary, tokenizer, kind):
    model, data = ternary
    gguf_write.write(model, tmp_path / "x.gguf", kind, tokenizer=tokenizer, embedding_type="F16")
    agreement, excess = compare(model, data, tmp_path / "x.gguf")
    assert agreement >= 0.95
    assert abs(excess) < 0.01


def test_llama_cpp_runs_a_float_twin(tmp_path, twin, tokenizer):
    model, data = twin
    gguf_write.write(model, tmp_path / "x.gguf", "F16", tokenizer=tokenizer)
    agreement, excess = compare(model, data, tmp_path / "x.gguf")
    assert agreement >= 0.99
    assert abs(excess) < 0.002


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": False}, {"head_dim": 32, "rope_theta": 5e5}],
    ids=["grouped", "mha", "untied", "narrow heads"],
)
@pytest.mark.parametrize("quantizer", ["none", "ternary"])
def test_llama_cpp_runs_models_without_sub_norms(tmp_path, tokenizer, quantizer, changes):
    """The order of the rotary rows, the head, and the ternary scales in the architecture llama."""
    model = gguf_model(sub_norm=False, quantizer=quantizer, **changes)
    gguf_write.write(model, tmp_path / "x.gguf", "F32", tokenizer=tokenizer)
    back = open_source(tmp_path / "x.gguf").model()
    ids = torch.arange(260, 300).view(1, 40)
    # llama.cpp leaves the activations of float files alone.
    plain = BitNetForCausalLM(model.config.replace(quantizer="none"))
    plain.load_state_dict(
        {
            n: v * 1.0 if not n.endswith("_proj.weight") or quantizer == "none" else fake(v)
            for n, v in model.state_dict().items()
        }
    )
    with torch.no_grad(), LlamaModel(tmp_path / "x.gguf", 128) as loaded:
        theirs = torch.tensor(loaded.logits(ids[0].tolist()))
        assert (plain(ids)[0] - theirs).abs().max() < 0.03  # llama.cpp keeps keys and values in float16
        assert (back(ids) - model(ids)).abs().max() < (1e-5 if quantizer == "none" else 0.2)


def fake(weight: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize_ternary(weight)
    return codes * scale


def logits_of_both(path: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and llama.cpp's of one file."""
    with torch.no_grad(), LlamaModel(path, 64) as loaded:
        return open_source(path).model()(ids[None])[0], torch.tensor(loaded.logits(ids.tolist()))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


ARCHITECTURES: dict[str, dict[str, bool]] = {
    "llama": {"sub_norm": False},
    "qwen2": {"sub_norm": False, "qkv_bias": True},
    "qwen3": {"sub_norm": False, "qk_norm": True},
    "bitnet": {"sub_norm": True},
}
# Every type once, each architecture with a quarter of them; all pairs in the long run.
PAIRS = [
    (kind, arch)
    for i, kind in enumerate(kind for kind in blocks.TYPES if not kind.startswith(("TQ", "PQ")))
    for j, arch in enumerate(ARCHITECTURES)
    if (i + j) % 4 == 0 or os.environ.get("BITNET_LONG")
]


@pytest.mark.parametrize(("kind", "arch"), PAIRS)
def test_llama_cpp_and_the_engine_run_every_block_type(tmp_path, tokenizer, kind, arch):
    """The engine's `float` computes what the format says. llama.cpp quantizes activations to 8 bits a block of 32 or
    256; so does `int8`, and it is nearer to what the format says than llama.cpp is, of both in the same file."""
    model = gguf_model(quantizer="none", num_hidden_layers=1, **ARCHITECTURES[arch])
    written = model
    if kind in NEEDS_IMPORTANCE:
        written = quantize_model(copy.deepcopy(model), f"gguf-{kind.lower()}", torch.randint(400, (4, 64)))
    path, floats = tmp_path / "x.gguf", tmp_path / "floats.gguf"
    gguf_write.write(written, path, kind, tokenizer=tokenizer)
    stored = {info.type for info in GGUFFile(path).tensors.values()}
    assert stored == {"F32", kind, kind if kind == "Q8_0" else "Q6_K"}
    exact = open_source(path).latent("none").eval()
    gguf_write.write(exact, floats, "F32", tokenizer=tokenizer)
    ids = torch.arange(260, 300)
    ours, theirs = logits_of_both(path, ids)
    with torch.no_grad(), LlamaModel(floats, 64) as loaded:
        expected, theirs_in_float = exact(ids[None])[0], torch.tensor(loaded.logits(ids.tolist()))
        found = {way: open_model(path, activations=way)(ids[None])[0] for way in ("float", "int16", "int8")}
        loss = distance(expected, model(ids[None])[0])
    assert distance(theirs_in_float, expected) < 2e-3  # keys and values are float16 there
    assert distance(ours, theirs) < 0.04
    assert distance(found["float"], expected) < 1e-5
    assert distance(found["int16"], expected) < 2e-4
    assert distance(found["int8"], theirs) < 0.05
    assert distance(found["int8"], expected) < 1.02 * distance(theirs, expected)
    # Random weights, no structure to exploit.
    limits = {"Q1_0": 1.4, "Q2_0": 1.0, "Q2_K": 1.0, "Q3_K": 0.6, "IQ3_S": 0.4, "IQ3_XXS": 0.55, "IQ2_S": 0.7}
    limits |= {"IQ2_XS": 0.8, "IQ2_XXS": 0.9, "IQ1_M": 1.1, "IQ1_S": 1.2}
    assert loss < limits.get(kind, 0.35)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_L", "Q4_K_M", "Q5_1", "IQ4_NL", "IQ4_XS", "IQ3_M"])
def test_files_that_llama_cpp_quantized_are_read(tmp_path, tokenizer, kind):
    gguf_write.write(gguf_model(quantizer="none", sub_norm=False), tmp_path / "x.gguf", "F32", tokenizer=tokenizer)
    quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", FILE_TYPES[kind])
    ours, theirs = logits_of_both(tmp_path / "y.gguf", torch.arange(260, 300))
    assert distance(ours, theirs) < 0.05


def test_smollm2_agrees_with_transformers(tmp_path):
    """A real model in Q4_1, its weights dequantized independently, in transformers' own class."""
    library, transformers = oracles.require("gguf"), oracles.require("transformers")
    path = oracles.smollm2()
    model = open_source(path).model()
    reader = library.GGUFReader(path)
    weights = {t.name: torch.from_numpy(library.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    names = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj",
             "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for layer in range(30):
        for short, name in names.items():
            state[f"model.layers.{layer}.{name}.weight"] = weights[f"blk.{layer}.{short}.weight"]
        for short, heads in (("q", 9), ("k", 3)):
            rows = weights[f"blk.{layer}.attn_{short}.weight"].view(heads, 32, 2, 576)
            state[f"model.layers.{layer}.self_attn.{short}_proj.weight"] = rows.transpose(1, 2).reshape(-1, 576)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    ids = torch.randint(0, 49152, (1, 24))
    with torch.no_grad():
        assert (model(ids) - theirs.eval()(ids).logits).abs().max() < 2e-3
