"""The measure of agreement accepts another backend of this project, and nothing that is a little wrong."""

import copy

import pytest
import torch

from bitnet import kernels
from bitnet.model import ModelConfig
from bitnet.storage.hf.write import write
from bitnet.storage.source import open_source
from tests.builders import random_model
from tests.vllm.agreement import Agreement, Judge, Position, exact_logits, likeliest

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Judge:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model") / "hf"
    write(random_model(CONFIG), folder, "packed")
    return Judge(open_source(str(folder)), torch.randint(300, (10, 21)).tolist())


def listed(judge: Judge, model: torch.nn.Module) -> list[Position]:
    with torch.no_grad(), kernels.use_backend("reference"):
        return likeliest(model(torch.tensor(judge.prompts))[:, :-1])


def test_another_backend_is_accepted_and_one_scale_of_14_is_not(judge):
    model = copy.deepcopy(judge.exact_model).float()
    found = judge.positions(listed(judge, model))
    assert judge.accepts_positions(found)
    assert found.equal >= 195
    model.model.layers[1].mlp.down_proj.weight_scale.mul_(1.05)
    assert not judge.accepts_positions(judge.positions(listed(judge, model)))


def test_texts_may_differ_between_near_ties_only(judge):
    texts = [[int(row.argmax())] for row in exact_logits(judge.exact_model, torch.tensor(judge.prompts))[:, -1]]
    assert judge.accepts_texts(judge.texts(texts, texts))
    assert judge.texts(texts, texts) == Agreement(10, 10, 0.0, 0.0)
    other = [[(texts[0][0] + 1) % 300], *texts[1:]]
    assert not judge.accepts_texts(judge.texts(other, texts))
