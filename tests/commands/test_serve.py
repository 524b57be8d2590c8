"""bitnet serve: its options reach the models."""

from pathlib import Path

import pytest

from bitnet.commands import serve
from bitnet.kernels.cpu import native
from bitnet.serving import server
from bitnet.storage.gguf import write as gguf_write
from tests.kernels.builders import NOT_BUILT
from tests.storage.builders import SHAPE, gguf_model
from tests.vocabularies import stdlib_tokenizer


@pytest.mark.skipif(not native.instruction_sets(), reason=NOT_BUILT)
def test_models_are_opened_as_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_model(quantizer="none", sub_norm=False, num_hidden_layers=1)
    gguf_write.write(model, tmp_path / "x.gguf", "Q4_0", tokenizer=stdlib_tokenizer(SHAPE.vocab_size))
    served = []
    monkeypatch.setattr(server, "serve", lambda models, settings: served.extend(models))
    for activations in (None, "int8", "int16", "float"):
        serve.run(serve.Options(models=(str(tmp_path / "x.gguf"),), activations=activations))
        assert served.pop()[1].kernel == f"native {activations or 'int16'}"
