"""The real llama.cpp through ctypes, as an oracle: load a GGUF file, tokenize, compute logits.

The shared libraries are those of the npm package @node-llama-cpp/linux-x64, unpacked under `sys.prefix/oracles`. The
two parameter structs are declared longer than they are: they are filled by the library's own default functions and
handed back by value, so only the offsets of the few fields that are set here must be right.
"""

import ctypes
import functools
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np

from bitnet.storage.gguf.container import write_file
from bitnet.tokenizer import BaseTokenizer
from tests import oracles

FOLDER = Path(sys.prefix) / "oracles" / "package" / "bins" / "linux-x64"
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class _ModelParams(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_byte * 512)]


class _ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("rest", ctypes.c_byte * 512),
    ]  # fmt: skip


class _Importance(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("size", ctypes.c_size_t)]


class _QuantizeParams(ctypes.Structure):
    _fields_ = [
        ("n_threads", c_int32), ("file_type", c_int32), ("between", ctypes.c_byte * 16),
        ("importance", POINTER(_Importance)), ("rest", ctypes.c_byte * 512),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


_SIGNATURES = {
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_quantize_default_params": (_QuantizeParams, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(_QuantizeParams)]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_model_chat_template": (c_char_p, [c_void_p, c_char_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_free": (None, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, c_void_p]),
}  # fmt: skip
log: list[str] = []
"""What the library said, for the message of a failed load."""


@_LOG
def _collect(level: int, text: bytes, data: int) -> None:
    log.append(text.decode("utf-8", "replace"))


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; skips or fails the test where it is not installed."""
    path = next(iter(sorted(FOLDER.glob("libllama.v*.so"))), None)
    if path is None:
        oracles.missing(
            f"llama.cpp is not installed (no libllama in {FOLDER.relative_to(sys.prefix)} of the environment)"
        )
    lib = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    lib.llama_log_set(_collect, None)
    ggml = ctypes.CDLL(str(next(iter(FOLDER.glob("libggml.v*.so")))))
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
    lib.llama_backend_init()
    return lib


def quantize(source: Path, target: Path, file_type: int, importance: dict[str, np.ndarray] | None = None) -> None:
    """llama.cpp's own conversion of a float file to one of its file types, as `llama-quantize` does it. `importance`
    is float32 `[K]` by tensor."""
    params = library().llama_model_quantize_default_params()
    params.n_threads, params.file_type = 1, file_type
    if importance:
        entries = [_Importance(name.encode(), data.ctypes.data, data.size) for name, data in importance.items()]
        params.importance = (_Importance * (len(entries) + 1))(*entries)  # the last one has no name
    log.clear()
    code = library().llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, "".join(log[-6:])


class LlamaModel:
    """A GGUF file in llama.cpp, on one thread. Raises ValueError, with the library's words, for one it refuses."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self.lib = library()
        log.clear()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError("llama.cpp refuses the file: " + "".join(log[-6:]))
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp makes no context: " + "".join(log[-6:]))
        self.lib.llama_set_n_threads(self.context, 1, 1)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.vocab)
        self.bos_id, self.eos_id = self.lib.llama_vocab_bos(self.vocab), self.lib.llama_vocab_eos(self.vocab)
        self.adds_bos = self.lib.llama_vocab_get_add_bos(self.vocab)

    def __enter__(self) -> "LlamaModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    @property
    def chat_template(self) -> str | None:
        template = self.lib.llama_model_chat_template(self.model, None)
        return None if template is None else template.decode()

    def tokenize(self, text: str, *, special: bool = False, parse_special: bool = False) -> list[int]:
        """Ids of a text; `special` adds the file's <s>, `parse_special` reads "<s>" in the text as a token."""
        data = text.encode()
        buffer = (c_int32 * (len(data) + 16))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), special, parse_special)
        assert count >= 0, count
        return list(buffer[:count])

    def detokenize(self, ids: list[int]) -> str:
        tokens = (c_int32 * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        count = self.lib.llama_detokenize(self.vocab, tokens, len(ids), buffer, len(buffer), False, False)
        assert count >= 0, count
        return buffer.raw[:count].decode("utf-8", "replace")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 `[T, V]` of one sequence from its first position on; at most the context's length."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        code = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert code == 0, code
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (len(ids), self.vocab_size)).copy()


VOCAB_ONLY = 72  # offset of the field in llama_model_params


class Vocabulary(LlamaModel):
    """llama.cpp's tokenizer of a file, whose tensors are not asked for."""

    def __init__(self, path: Path) -> None:
        self.lib = library()
        params = self.lib.llama_model_default_params()
        params.bytes[VOCAB_ONLY] = 1
        log.clear()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ValueError("".join(log[-6:]))
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def __exit__(self, *error: object) -> None:
        self.lib.llama_model_free(self.model)

    def eog_ids(self) -> set[int]:
        is_eog = self.lib.llama_vocab_is_eog
        is_eog.restype, is_eog.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_int32]
        return {i for i in range(self.lib.llama_vocab_n_tokens(self.vocab)) if is_eog(self.vocab, i)}


def vocabulary(path: Path, metadata: dict) -> Vocabulary:
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    shape = {f"llama.{name}": 64 for name in sizes} | {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    write_file(path, {"general.architecture": "llama"} | shape | metadata, [])
    return Vocabulary(path)


def differences(ours: BaseTokenizer, theirs: Vocabulary, texts: list[str]) -> list[str]:
    """Texts whose ids differ, plain or with special tokens in them."""
    first, *_ = ours.specials
    mixed = [text.replace(" ", first, 2) + "<tool>x" for text in texts]
    different = [text for text in texts if ours.encode(text) != theirs.tokenize(text)]
    return different + [t for t in mixed if ours.encode(t, special=True) != theirs.tokenize(t, parse_special=True)]
