"""lm-evaluation-harness on an offline task: the same scores in process, through the command and through the server.

Run by `make conformance`.
"""

import json

import pytest

from bitnet.tokenizer.json_write import sentencepiece_files
from tests import oracles
from tests.builders import save_run, tiny_model

lm_eval = oracles.require("lm_eval")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
WORDS = "generation_kwargs: {until: [a, b], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks on one file of questions, made up of nothing."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"def f{i}(x): return",
            "choices": [" x", f" {i}", " self.x + 1"],
            "gold": i % 3,
            "text": f"x{i} y",
        }
        for i in range(12)
    ]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data": path / "data.jsonl"}
    for name, kind, target, more in (
        ("choice", "multiple_choice", "{{gold}}", CHOICES),
        ("rolling", "loglikelihood_rolling", "{{text}}", "metric_list: [{metric: word_perplexity}]"),
        ("written", "generate_until", "{{text}}", WORDS),
    ):
        (path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, target=target, more=more, **common))
    return path


@pytest.fixture(scope="module")
def in_process(model, folder):
    from bitnet.evaluation.harness import run_tasks

    return run_tasks(model, ["choice", "rolling", "written"], folder=folder)


def test_the_server_gives_the_scores_of_the_process(
    model, address, folder, in_process, tokenizer, tmp_path, monkeypatch
):
    for name, content in sentencepiece_files(tokenizer.model_proto).items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    # Of a whole text lm_eval itself puts the begin-of-text token in front.
    for tasks, add_bos_token in ((["choice", "written"], True), (["rolling"], False)):
        arguments = {
            "model": "tiny", "base_url": f"{address}/v1/completions", "tokenizer": str(tmp_path), "tokenizer_backend":
            "huggingface", "add_bos_token": add_bos_token, "max_length": model.positions - 1, "batch_size": 5,
            "num_concurrent": 2,
        }  # fmt: skip
        found = lm_eval.simple_evaluate(
            "local-completions", model_args=arguments, tasks=tasks, task_manager=manager, log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
        for task in tasks:
            for metric, value in in_process[task].items():
                if isinstance(value, float):
                    assert found["results"][task][metric] == pytest.approx(value, rel=1e-6, abs=1e-6), (task, metric)
    assert 0 <= in_process["choice"]["acc,none"] <= 1


def test_likelihoods_are_the_models(model, monkeypatch):
    import torch

    from bitnet.evaluation.harness import BitnetLM

    harness = BitnetLM(model)
    context, continuation = model.encode("def f(x):"), [7, 9, 300]
    ((value, greedy),) = harness._loglikelihood_tokens([(("", ""), context, continuation)])
    logprobs = model.model(torch.tensor([context + continuation[:-1]]))[0].log_softmax(-1)[len(context) - 1 :]
    wanted = logprobs[torch.arange(3), torch.tensor(continuation)]
    assert value == pytest.approx(float(wanted.sum()), abs=1e-4)
    assert greedy == (logprobs.argmax(-1).tolist() == continuation)


def test_texts_that_are_drawn_again_differ(model):
    """All had one seed: of a task with repeats, every text of a question was the same."""
    from lm_eval.api.instance import Instance

    from bitnet.evaluation.harness import BitnetLM

    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, ("def f(x):", options), 0)] * 3
    assert len(set(BitnetLM(model).generate_until(asked))) == 3


def test_the_command(tmp_path, folder, tokenizer, capsys):
    from bitnet.__main__ import main

    run = save_run(tmp_path / "run", tiny_model(vocab_size=512), tokenizer)
    assert main(["evaluate", str(run), "--tasks", "choice", "--task-folder", str(folder), "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert "acc_norm" in out


def test_a_task_that_leaves_no_room_for_its_question_is_refused(model, folder, tmp_path):
    from bitnet.evaluation.harness import run_tasks

    text = (folder / "written.yaml").read_text().replace("task: written", "task: long")
    (tmp_path / "long.yaml").write_text(text.replace("max_gen_toks: 12", f"max_gen_toks: {model.positions}"))
    with pytest.raises(ValueError, match=f"texts of up to {model.positions} tokens, and the model has"):
        run_tasks(model, ["long"], folder=tmp_path, limit=1)
