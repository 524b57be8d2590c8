"""Unused rows of a head are drawn on no path, whatever their logits, and have no probability."""

import json
import math
from pathlib import Path

import pytest
import torch

import bitnet
from bitnet.inference import text_model
from bitnet.inference.batch import write_answers
from bitnet.inference.generation import generate
from bitnet.inference.lookup import PromptLookup
from bitnet.inference.options import SamplingConfig, TextOptions
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from bitnet.model import PRESETS, BitNetForCausalLM
from bitnet.serving.jobs import Generation, PromptScores
from bitnet.storage.gguf import write as gguf_write
from bitnet.storage.source import open_source
from bitnet.tokenizer import gguf_write as vocabularies
from bitnet.tokenizer.proto import UNUSED
from tests.inference.builders import AlwaysDrafts
from tests.kernels.builders import NOT_BUILT
from tests.oracles import require
from tests.vocabularies import stdlib_tokenizer

ROWS, TOKENS, INSIDE = 520, 500, (300, 301, 437)
UNUSED_IDS = {*INSIDE, *range(TOKENS, ROWS)}
WAYS = ({"temperature": 0}, {}, {"temperature": 1.5, "min_p": 0}, {"top_k": 600, "repetition_penalty": 1.2})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file whose unused rows have the largest logits: of rows w and -w one is always far above all others."""
    torch.manual_seed(0)
    config = PRESETS["tiny"].replace(vocab_size=ROWS, tie_word_embeddings=False, quantizer="none", sub_norm=False)
    model = BitNetForCausalLM(config.replace(initializer_range=0.2)).eval()
    with torch.no_grad():
        for place, row in enumerate(sorted(UNUSED_IDS)):
            model.lm_head.weight[row] = (-1) ** place * 20 * model.lm_head.weight[0].sign()
    metadata = vocabularies.vocabulary(stdlib_tokenizer(TOKENS), ROWS)
    for row in INSIDE:
        metadata["tokenizer.ggml.token_type"][row] = UNUSED
    path = tmp_path_factory.mktemp("padded") / "padded.gguf"
    gguf_write.write(model, path, "F16", tokenizer=metadata)
    return path


@pytest.fixture(scope="module", params=["torch", pytest.param("native", marks=pytest.mark.skipif(
    not native.instruction_sets(), reason=NOT_BUILT))])  # fmt: skip
def model(request: pytest.FixtureRequest, path: Path) -> TextModel:
    source = open_source(path)
    model = bitnet.load(path, device="cpu") if request.param == "native" else TextModel(source.model(), source)
    assert model.kernel.startswith(request.param)
    return model


def test_they_would_be_drawn(model):
    greedy = {"max_new_tokens": 4, "sampling": SamplingConfig(temperature=0), "seed": 0}
    assert {int(ids[0]) for ids in generate(model.model, [[1, 5]], **greedy)} <= UNUSED_IDS
    size, unused = model.source.tokenizer.drawable
    assert (size, unused) == (TOKENS, INSIDE)
    assert {int(ids[0]) for ids in generate(model.model, [[1, 5]], vocab_size=size, **greedy)} <= {*INSIDE}
    assert not {int(ids[0]) for ids in generate(model.model, [[1, 5]], vocab_size=size, unused=unused, **greedy)} & {
        *UNUSED_IDS
    }


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_texts_have_none(model, how):
    texts = model.generate_many(["def wrap(", [3, 4], [5, 300], [501, 3]], max_new_tokens=6, seed=1, **how)
    texts += model.generate_many([[3, 4], [5, 300]], max_new_tokens=6, seed=1, **how)  # in torch a static batch
    several = model.batch("return", TextOptions(max_new_tokens=6, seed=1, **how), 3)
    list(several)
    for text in (*texts, *several.completions, model.generate("self", max_new_tokens=6, seed=1, **how)):
        assert text.new_tokens
        assert not UNUSED_IDS & {*text.token_ids}
        assert "PAD" not in text.text


def test_probabilities_are_of_all_that_can_be_drawn(model):
    known = TOKENS - len(INSIDE)
    for drawn in model.generate([7, 300], max_new_tokens=3, seed=1, logprobs=known).drawn:
        assert sum(math.exp(value) for _, value in drawn.top) == pytest.approx(1, abs=1e-5)
        assert {token for token, _ in drawn.top} == {*range(TOKENS)} - {*INSIDE}
        assert drawn.logprob == dict(drawn.top)[drawn.token]
    with pytest.raises(ValueError, match=f"give a number of tokens from 0 to {known}"):
        model.generate([7], logprobs=known + 1)


def test_drafts_and_files_of_prompts_have_none(model, path, tmp_path, monkeypatch):
    wanted = model.generate([9, 300, 9, 300, 9, 300], max_new_tokens=12, seed=2)
    if model.kernel != "torch":  # drafts, of which some are unused tokens
        drafting = bitnet.load(path, device="cpu", prompt_lookup_num_tokens=7)
        drafting._memory.lookup = AlwaysDrafts(7)
        assert drafting.generate([9, 300, 9, 300, 9, 300], max_new_tokens=12, seed=2).token_ids == wanted.token_ids
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": [5, 300, token]}) + "\n" for token in range(4)))
    written: list[int] = []
    push = text_model.OpenText.push
    monkeypatch.setattr(text_model.OpenText, "push", lambda text, one: written.append(one.token) or push(text, one))
    write_answers(model, prompts, out, TextOptions(max_new_tokens=6), seed=1, rows=2)
    assert len(written) > 4
    assert not UNUSED_IDS & {*written}


def test_the_scheduler_draws_and_scores_without_them(model):
    require("prometheus_client")
    from bitnet.serving.errors import ApiError
    from tests.serving.builders import Bench

    bench = Bench(model, PromptLookup(0))
    known, prompt = TOKENS - len(INSIDE), (7, 300, 8, 510)
    job = bench.submit(Generation(prompt, 5, SamplingConfig(1.0), seed=3, count=3, alternatives=known, scores_from=1))
    bench.run()
    for sample in job.samples:
        assert not UNUSED_IDS & {*sample.ids[len(prompt) :]}
    (scores,) = [event.scores for event in bench.of(job) if isinstance(event, PromptScores)]
    for score in scores:
        assert {token for token, _ in score.best} == {*range(TOKENS)} - {*INSIDE}
        assert sum(math.exp(value) for _, value in score.best) == pytest.approx(1, abs=1e-5)
    assert [math.isfinite(score.logprob) and score.logprob < -1e30 for score in scores] == [True, False, True]
    for piece in bench.pieces(job)[0]:
        for token in piece.tokens:
            assert token.score.logprob == dict(token.score.best)[token.id]
    with pytest.raises(ApiError, match=f"there are {known}"):
        bench.submit(Generation(prompt, 5, alternatives=known + 1))
