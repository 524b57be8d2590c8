"""A trained ternary model behind vLLM's server, under vLLM's own benchmark and lm-eval. Run by `make vllm`."""

import json
import os

import pytest

if not os.environ.get("BITNET_VLLM_TESTS"):
    pytest.skip("vLLM has an environment of its own: make vllm", allow_module_level=True)

import lm_eval

import bitnet
from benchmarks import vllm_serve
from bitnet.evaluation.harness import run_tasks
from tests.serving.conformance_lm_eval import CHOICES, TASK

QUESTIONS = {
    "The people of the United": [" States", " walrus", " of"],
    "I recommend to the Congress that": [" it pass the law", " purple elephants", " quickly the of"],
    "The Secretary of the": [" Treasury", " potato", " and but"],
    "In the past year we have": [" made progress", " xylophone zebra", " the the the"],
}


@pytest.fixture(scope="module")
def options(trained) -> vllm_serve.Options:
    return vllm_serve.Options(str(trained), streams=(1, 3), prompt_tokens=160, new_tokens=8, eager=True)


@pytest.fixture(scope="module")
def folder(options, tmp_path_factory):
    return vllm_serve.make_folders(options, tmp_path_factory.mktemp("folders"))["ternary"]


@pytest.fixture(scope="module")
def address(options, folder):
    with vllm_serve.server(vllm_serve.TERNARY, folder, options) as (url, process):
        yield url
        assert vllm_serve.memory(process) > 100 * 2**20


def test_its_benchmark_runs_behind_a_gate(address, folder, options, tmp_path):
    gate = vllm_serve.Gate(folder)
    gate.check(vllm_serve.TERNARY, address)
    for streams in options.streams:
        found = vllm_serve.bench(address, folder, streams, options, tmp_path)
        assert found["requests"] >= 4
        assert all(found[key] > 0 for key in vllm_serve.MEASURED)
    vocab_size = gate.engine.config.vocab_size
    gate.texts, engine = [[(id + 1) % vocab_size for id in text] for text in gate.texts], gate.engine
    gate.engine = lambda ids: -engine(ids)  # a model that prefers least what this one prefers
    with pytest.raises(ValueError, match="red: "):
        gate.check(vllm_serve.TERNARY, address)


def test_lm_eval_gives_the_scores_of_our_engine(address, folder, tmp_path, monkeypatch):
    # Long enough that codes which flip with the last bits of sums are few among many.
    text = " ".join(question + choice for question, choices in QUESTIONS.items() for choice in choices)
    rows = [
        {"question": question, "choices": choices[turn:] + choices[:turn], "gold": -turn % 3, "text": text}
        for question, choices in QUESTIONS.items()
        for turn in range(3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    perplexity = "metric_list: [{metric: word_perplexity}]"
    for name, kind, target, more in (
        ("choice", "multiple_choice", "{{gold}}", CHOICES),
        ("rolling", "loglikelihood_rolling", "{{text}}", perplexity),
    ):
        task = TASK.format(name=name, kind=kind, target=target, more=more, data=tmp_path / "data.jsonl")
        (tmp_path / f"{name}.yaml").write_text(task)
    ours = run_tasks(bitnet.load(str(folder)), ["choice", "rolling"], folder=tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    for task, begin in (("choice", True), ("rolling", False)):  # of a whole text lm_eval itself puts the token in front
        arguments = {
            "model": "model", "base_url": f"{address}/v1/completions", "tokenizer": str(folder),
            "tokenizer_backend": "huggingface", "add_bos_token": begin, "max_length": 190, "batch_size": 4,
            "num_concurrent": 2,
        }  # fmt: skip
        found = lm_eval.simple_evaluate(
            "local-completions", model_args=arguments, tasks=[task], task_manager=manager, log_samples=False,
            bootstrap_iters=100,
        )["results"][task]  # fmt: skip
        print(f"\n{task}: vLLM {found}, ours {ours[task]}")
        for metric in ("acc,none", "acc_norm,none", "word_perplexity,none"):
            if metric in ours[task]:
                assert found[metric] == pytest.approx(ours[task][metric], rel=2e-3), metric
