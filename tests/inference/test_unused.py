"""Unused rows of a head are drawn on no path, whatever their logits, and have no probability."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import bitnet
from bitnet.__main__ import main
from bitnet.data.tokens import TokenArray
from bitnet.evaluation.agreement import Reference
from bitnet.evaluation.loss import evaluate, evaluate_model, unused_rows
from bitnet.evaluation.tasks import Question, Task
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


def test_losses_and_tasks_are_of_what_can_be_drawn(model):
    tokenizer, drawable = model.source.tokenizer, sorted({*range(ROWS)} - UNUSED_IDS)
    unused = unused_rows(tokenizer, ROWS)
    assert {*unused.tolist()} == UNUSED_IDS
    assert unused_rows(stdlib_tokenizer(TOKENS), TOKENS) is None
    ids = torch.tensor(drawable)[torch.randint(len(drawable), (33,), generator=torch.Generator().manual_seed(1))]
    logits = model.model(ids[None, :-1])[0].double().detach()
    logp = logits[:, drawable].log_softmax(-1)
    own = logp.gather(1, torch.tensor([[drawable.index(i)] for i in ids[1:].tolist()]))[:, 0]
    array = TokenArray([ids.numpy().astype(np.uint16)])
    found = evaluate(model.model, array, context=32, bytes_per_token=1.0, batch_size=1, unused=unused)
    assert found.loss == pytest.approx(-float(own.mean()), rel=1e-5)

    window = (ids[None, :-1], ids[None, 1:])
    words = [[(i, i + 1) for i in range(32)]]
    reference = Reference(model.model, [window], ROWS, words, unused)
    score = reference.score(model.model)
    assert score.loss == pytest.approx(-float(own.mean()), rel=1e-5)
    assert (score.kl, score.gap, score.top1) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9), 1)
    likeliest = torch.tensor(drawable)[logp.argmax(1)]
    assert score.cloze.share == float((likeliest == ids[1:]).double().mean())
    # Another model, whose unused rows say something else: nothing of them is in any number.
    noise = torch.zeros(ROWS).index_fill(0, unused, 50.0)
    assert reference.score(lambda batch: model.model(batch) + noise) == score

    # The likelier of two texts by what can be drawn; by all rows it is the other one.
    rows = ((1, 2, 3), (1, 4, 5, 6))
    sums = {}
    for row in rows:
        each = model.model(torch.tensor([row[:-1]]))[0].double().detach()
        sums[row] = sum(
            float(line[drawable].log_softmax(-1)[drawable.index(i)]) / len(row)
            for line, i in zip(each, row[1:], strict=True)
        )
    best, other = sorted(rows, key=lambda row: -sums[row])
    task = Task("t", [Question((best, other), 1, (len(best), len(other)))])
    assert task.accuracy(model.model, unused).share == 1
    louder = unused[:1]  # a padded row that takes nearly all where the better text goes on

    def loud(batch):
        logits = model.model(batch)
        logits[(batch[:, :2] == torch.tensor(best[:2])).all(1), 1:, louder] += 1000
        return logits

    assert task.accuracy(loud, unused).share == 1
    assert task.accuracy(loud).share == 0


def test_a_token_of_a_text_has_a_probability_although_it_is_never_drawn(model):
    """Suppressed tokens are those of a text like any other; without this its loss is 1e38."""
    unused, ids = unused_rows(model.source.tokenizer, ROWS), torch.tensor([5, 300, 7, 301, 9])
    logits = model.model(ids[None, :-1])[0].double().detach()
    kept = [sorted(({*range(ROWS)} - UNUSED_IDS) | {i}) for i in ids[1:].tolist()]
    expected = [
        float(line[one].log_softmax(-1)[one.index(i)])
        for line, one, i in zip(logits, kept, ids[1:].tolist(), strict=True)
    ]
    array = TokenArray([ids.numpy().astype(np.uint16)])
    found = evaluate(model.model, array, context=4, bytes_per_token=1.0, batch_size=1, unused=unused)
    assert found.loss == pytest.approx(-sum(expected) / 4, rel=1e-5)


def test_commands_measure_what_can_be_drawn(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"def wrap{i}(text):\n    return text[{i}:]\n" * 9)
    loss = evaluate_model(str(path), torch.device("cpu"), torch.float32, "texts").evaluation.loss
    assert loss < 30  # 7.3, of a model that knows nothing; 150 with the padded rows
    command = ["compare", str(path), "--text", "texts", "--methods", "none", "--tokens", "100000", "--tasks", "5"]
    assert main([*command, "--calibration-tokens", "256", "--no-speed", "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
