"""Write a model in another form: for this project's engine, for transformers, for llama.cpp.

    bitnet export runs/demo demo-packed                      2-bit codes, INT8 embedding
    bitnet export runs/demo demo-hf --to hf                  a folder for AutoModelForCausalLM
    bitnet export runs/demo demo.gguf --to gguf --type TQ1_0 a file for llama.cpp
    bitnet export demo-gptq4 demo-gptq-hf --to gptq          GPTQ's layout in a Hugging Face folder
    bitnet export demo-nf4 out.gguf --to gguf --merge-lora runs/polite      with an adapter in the weights

IN is anything that generate.py takes. Nothing ternary is quantized twice: codes and scales come from one quantization
of the latent weights, or from the file as they are. What a target cannot express is refused with the reason.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bitnet.files import JsonObject, check_writable

if TYPE_CHECKING:
    from bitnet.model import BitNetForCausalLM
    from bitnet.storage.source import Source
    from bitnet.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Options:
    source: Annotated[str, tyro.conf.arg(metavar="IN"), tyro.conf.Positional]
    """A run folder of train.py or one checkpoint of it, a packed or quantized folder, a Hugging Face folder, a GGUF
    file."""
    out: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """What to write; it must not exist."""
    to: Literal["packed", "hf", "gguf", "gptq"] = "packed"
    """packed: for this project's engine; hf: for transformers; gguf: for llama.cpp; gptq: GPTQ's layout, for others."""
    type: str | None = None
    """gguf: TQ2_0 (ternary models, unless given), TQ1_0, I2_S, F16, Q2_0 (with scales of groups, unless given), Q1_0
    (binary ones), or for float models any block type, Q8_0 unless given."""
    form: Literal["packed", "packed-inverse", "master"] | None = None
    """hf: packed (weight_scale multiplies), packed-inverse (it divides), or master (latent floats, quantized online);
    packed for ternary models unless given, master for float ones."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of a run folder."""
    merge_lora: Path | None = None
    """Add this LoRA adapter to the weights first: exact where they are floats, which NF4 and blocks of GGUF become. The
    weights of a ternary model are quantized again, and what that loses is said."""


def run(options: Options) -> None:
    if os.path.lexists(options.out):
        raise ValueError(f"{options.out} already exists; choose another name or delete it")
    check_writable(options.out)  # before the work, not behind it
    for name, target in (("type", "gguf"), ("form", "hf")):
        if getattr(options, name) is not None and options.to != target:
            raise ValueError(f"--{name} {getattr(options, name)} has no effect on --to {options.to}; leave it out")

    from bitnet.kernels import GROUP_SIZES
    from bitnet.storage.folders import save_packed
    from bitnet.storage.gguf import write as gguf_write
    from bitnet.storage.hf import gptq
    from bitnet.storage.hf import write as hf_write
    from bitnet.storage.hf.card import origin_of
    from bitnet.storage.source import open_source

    source = open_source(options.source, which=options.checkpoint)
    model = source.model() if options.merge_lora is None else _merged(source, options.merge_lora)
    is_float = model.config.quantizer == "none"
    if options.to == "packed":
        if is_float:
            raise ValueError(f"{options.source} is a float model, which has no packed form; see bitnet quantize")
        save_packed(options.out, model.pack(), source.tokenizer_files())
    elif options.to == "hf":
        form = options.form or ("master" if is_float else "packed")
        files = _for_transformers(source, model.config.max_position_embeddings)
        hf_write.write(model, options.out, form, tokenizer_files=files, origin=origin_of(source.path, source.settings))
    elif options.to == "gguf":
        template = source.chat_template.source if source.chat_template else None
        grouped = model.config.quantizer in GROUP_SIZES
        kind = options.type or ("Q8_0" if is_float else "Q2_0" if grouped else "TQ2_0")
        rounded = gguf_write.write(
            model,
            options.out,
            kind,
            tokenizer=_vocabulary(source),
            chat_template=template,
            name=options.out.stem,
            sampling=source.sampling,
        )
        if rounded:
            print(f"{kind}: the scales of the matrices were rounded to 16 bits, by {rounded:.1e} of themselves at most")
    else:
        files = _for_transformers(source, model.config.max_position_embeddings)
        gptq.write(model, options.out, files, origin=origin_of(source.path, source.settings))
    written = [options.out] if options.out.is_file() else list(options.out.iterdir())
    print(f"{options.out}: {sum(file.stat().st_size for file in written) / 1e6:.2f} MB")


def _for_transformers(source: Source, positions: int) -> dict[str, bytes]:
    """The files of a tokenizer as transformers reads them, with a tokenizer.json where it is one of sentencepiece's."""
    from bitnet.tokenizer import Tokenizer
    from bitnet.tokenizer.added import GENERATION
    from bitnet.tokenizer.json_write import sentencepiece_files

    files = source.tokenizer_files()
    if isinstance(source.tokenizer, Tokenizer) and "tokenizer.json" not in files:
        chat = source.chat_template
        made = sentencepiece_files(source.tokenizer, max_length=positions, chat=chat is not None)
        kept = json.loads(files.get(GENERATION, b"{}"))  # how the model's makers want its tokens drawn
        made[GENERATION] = json.dumps(kept | json.loads(made[GENERATION]), indent=1).encode()
        files |= made | (chat.files() if chat else {})
    return files


def _merged(source: Source, path: Path) -> BitNetForCausalLM:
    """The model with an adapter in its weights."""
    from bitnet.model.lora import merge
    from bitnet.storage.adapters import load_adapter

    adapter, base = load_adapter(path), source.frozen()
    adapter.check(base, source.path)
    merged, lost = merge(base, adapter.matrices)
    if merged.config.quantizer == "none":
        print(f"{path} is merged into float weights, exactly but for float32's rounding")
    else:
        print(
            f"{path} is merged into {merged.config.quantizer} weights, which were quantized again: what is lost is "
            f"{lost:.0%} of the adapter's weights. Keep the adapter apart (--lora) to lose nothing"
        )
    return merged


def _vocabulary(source: Source) -> BaseTokenizer | JsonObject:
    """What to write the vocabulary of a GGUF file from: the source that knows most about it."""
    from bitnet.storage.folders import TOKENIZER
    from bitnet.tokenizer import Tokenizer, load_tokenizer

    if source.kind == "gguf":  # names the pre-tokenizer, which a tokenizer made from it does not
        return source.settings
    tokenizer = source.tokenizer
    if not isinstance(tokenizer, Tokenizer) and (source.path / TOKENIZER).is_file():
        # From which the tokenizer.json was made, where both are one: it need not be brought into llama.cpp's form.
        with suppress(ValueError):
            own = load_tokenizer(source.path / TOKENIZER, config=source.settings)
            assert isinstance(own, Tokenizer)
            if _facts(own) == _facts(tokenizer):
                return Tokenizer(
                    own.model_proto, adds_bos=tokenizer.adds_bos, ends=tokenizer.eos_ids, unused=tokenizer.unused
                )
    return tokenizer


def _facts(tokenizer: BaseTokenizer) -> list[object]:
    """What is equal in two forms of one tokenizer."""
    pieces = (tokenizer.id_to_piece(i).replace(" ", "\u2581") for i in range(tokenizer.vocab_size))
    return [tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_space_prefix, *pieces]
