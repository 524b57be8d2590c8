"""replace_linear and pack on whole models: ours, torch's own, those of transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from bitnet.model.linear import BitLinear, PackedLinear, bit_linears, pack, replace_linear
from tests.builders import mlp

pytestmark = pytest.mark.usefixtures("reference_backend")


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of the modules of exactly this class, under every name they have."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is kind]


# replace_linear


@pytest.mark.parametrize("quantizer", ["ternary", "binary", "int4", "int8", "none"])
def test_replaced_mlp_trains_and_packs(quantizer: str) -> None:
    model = replace_linear(mlp(), quantizer=quantizer)
    assert kinds(model, BitLinear) == ["0", "2", "4"]
    x = torch.randn(128, 8)
    target = (x[:, :1] * 2 - x[:, 1:2]).tanh() + 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    model.eval()
    expected = model(x)
    packed = pack(model)
    assert packed is model
    assert kinds(model, PackedLinear) == ([] if quantizer == "none" else ["0", "2", "4"])
    # The int8 codes of a hidden layer may flip where the sums are a rounding apart: one code of 127 in a few places.
    error = (model(x) - expected).abs()
    assert error.median() < 1e-5
    assert error.max() < 0.02 * expected.abs().max()


def test_replace_keeps_names_parameters_and_mode() -> None:
    model = mlp().eval()
    model[2].weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert replace_linear(model) is model
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())


def test_an_optimizer_made_before_still_works() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_linear(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_quantizer_none_changes_nothing() -> None:
    model, x = mlp(), torch.randn(4, 8)
    expected = model(x)
    assert torch.equal(replace_linear(model, quantizer="none")(x), expected)


def test_filter_by_name() -> None:
    seen = []

    def keep(name: str, linear: nn.Linear) -> bool:
        seen.append((name, linear.out_features))
        return name != "2"

    model = replace_linear(mlp(), keep)
    assert seen == [("0", 32), ("2", 32), ("4", 1)]
    assert kinds(model, BitLinear) == ["0", "4"]
    assert kinds(model, nn.Linear) == ["2"]
    replace_linear(model, lambda name, linear: True, quantizer="int8")  # a second pass takes what is left
    assert {name: module.quantizer for name, module in bit_linears(model)} == {
        "0": "ternary",
        "2": "int8",
        "4": "ternary",
    }


class TinyLM(nn.Module):
    """A head that is tied to the embedding, under any name, and one that isn't."""

    def __init__(self, tied: bool, name: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.name = name
        setattr(self, name, nn.Linear(16, 20, bias=False))
        if tied:
            getattr(self, name).weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return getattr(self, self.name)(self.body(self.embed(ids)))


@pytest.mark.parametrize(("tied", "name"), [(True, "lm_head"), (True, "decoder"), (False, "lm_head"), (False, "out")])
def test_head_stays_in_high_precision_and_tied(tied: bool, name: str) -> None:
    model = replace_linear(TinyLM(tied, name))
    head = getattr(model, name)
    kept = tied or name == "lm_head"
    assert type(head) is (nn.Linear if kept else BitLinear)
    assert type(model.body) is BitLinear
    assert (head.weight is model.embed.weight) == tied
    model = pack(model)
    assert (type(head) is nn.Linear) == kept
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 20)


def test_lm_head_only_by_its_own_name() -> None:
    model = nn.ModuleDict({"lm_head_norm": nn.Linear(4, 4), "head": nn.ModuleDict({"lm_head": nn.Linear(4, 4)})})
    assert kinds(replace_linear(model), BitLinear) == ["lm_head_norm"]


def test_tied_linears_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    replace_linear(model)
    assert model[0] is not model[1]
    assert model[0].weight is model[1].weight


@pytest.mark.parametrize("convert", [replace_linear, lambda model: pack(replace_linear(model))])
def test_module_used_in_two_parents_stays_one_module(convert) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared))
    convert(model)
    assert model[0][0] is model[1][0]
    assert type(model[0][0]) is not nn.Linear


@pytest.mark.parametrize("convert", [replace_linear, lambda model: pack(replace_linear(model))])
def test_module_used_twice_in_one_parent_stays_one_module(convert) -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert(model)
    assert not kinds(model, nn.Linear)
    assert model[0] is model[2]


def test_model_that_is_itself_a_linear() -> None:
    linear, x = nn.Linear(8, 4), torch.randn(2, 8)
    model = replace_linear(linear)
    assert type(model) is BitLinear
    assert model.weight is linear.weight
    packed = pack(model)
    assert type(packed) is PackedLinear
    torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()), nn.MultiheadAttention(8, 2), nn.ReLU()]
)
def test_nothing_to_replace_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=type(model).__name__):
        replace_linear(model)


def test_nothing_left_to_replace_is_an_error() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="filter"):
        replace_linear(model, lambda name, linear: False)
    assert kinds(model, nn.Linear) == ["0", "2", "4"]
    replace_linear(model)
    with pytest.raises(ValueError, match="BitLinear"):
        replace_linear(model)


def test_a_filter_that_raises_leaves_the_model_as_it_was() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        replace_linear(model, lambda name, linear: name == "0" or bool(1 / 0))
    assert kinds(model, nn.Linear) == ["0", "2", "4"]


def test_subclasses_of_linear_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = replace_linear(nn.Sequential(Mine(4, 4), nn.Linear(4, 4)))
    assert [type(module) for module in model] == [Mine, BitLinear]


# pack


@pytest.mark.parametrize("model", [mlp(), nn.Linear(4, 4), nn.ReLU()])
def test_pack_without_bit_linears_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=type(model).__name__):
        pack(model)


def test_pack_twice_is_an_error() -> None:
    model = pack(replace_linear(mlp()))
    with pytest.raises(ValueError, match="no BitLinear"):
        pack(model)


def test_pack_leaves_the_quantizer_none() -> None:
    model = replace_linear(mlp(), lambda name, linear: name == "0", quantizer="none")
    replace_linear(model)
    pack(model)
    assert kinds(model, BitLinear) == ["0"]
    assert kinds(model, PackedLinear) == ["2", "4"]


def test_pack_keeps_each_layers_quantizer_and_mode() -> None:
    model = replace_linear(mlp(), lambda name, linear: name == "0", quantizer="int8")
    pack(replace_linear(model).eval())
    assert [model[i].bits for i in (0, 2, 4)] == [8, 2, 2]
    assert not any(module.training for module in model.modules())


def test_repr_names_the_quantizer() -> None:
    assert "quantizer=int4" in repr(BitLinear(4, 3, quantizer="int4"))
    assert "quantizer=int4, bits=4" in repr(PackedLinear(4, 3, quantizer="int4"))


# torch's own attention and encoder, which read weights instead of calling modules.
# In float64, where the noise between torch's fused and plain attention is too small to flip an int8 code.


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attention(x, x, x, need_weights=False)[0])


def test_multihead_attention_is_untouched_and_works() -> None:
    model, x = Attending().double(), torch.randn(2, 5, 16).double()
    out_proj = model.attention.out_proj
    expected = model.attention(x, x, x)[0]
    replace_linear(model)
    assert model.attention.out_proj is out_proj
    assert type(model.linear) is BitLinear
    assert torch.equal(model.attention(x, x, x)[0], expected)
    model(x).sum().backward()
    with torch.no_grad():
        slow = model(x)
        torch.testing.assert_close(model.eval()(x), slow, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pack(model)(x), slow, rtol=1e-5, atol=1e-5)


PADDING = {
    "none": None,
    "left aligned": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),  # torch's nested-tensor path
    "scattered": torch.tensor([[False, True, False, False, True], [False] * 5]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("whole_encoder", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("packed", [False, True])
def test_transformer_encoder_in_eval_mode(whole_encoder: bool, activation: str, padding: str, packed: bool) -> None:
    model: nn.Module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation)
    if whole_encoder:
        model = nn.TransformerEncoder(model, 2)
    replace_linear(model).double().eval()
    x, mask = torch.randn(2, 5, 16).double(), PADDING[padding]
    visible = slice(None) if mask is None else ~mask
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)  # torch's plain path calls the modules: the expected values
        try:
            expected = model(x, src_key_padding_mask=mask)[visible]
            if packed:
                pack(model)
                expected = model(x, src_key_padding_mask=mask)[visible]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        y = model(x, src_key_padding_mask=mask)[visible]
    torch.testing.assert_close(y, expected)


def test_transformer_encoder_calls_every_bit_linear() -> None:
    encoder = replace_linear(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)).eval()
    calls = []
    for name, module in bit_linears(encoder):
        # Not a forward hook: torch leaves its fused path where there are hooks, and the test would prove nothing.
        forward = module.forward
        module.forward = lambda x, name=name, forward=forward: (calls.append(name), forward(x))[1]  # type: ignore
    with torch.no_grad():
        encoder(torch.randn(2, 5, 16))
    assert calls == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]


def test_encoder_without_swapped_layers_keeps_its_fused_path() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 2))
    replace_linear(model, lambda name, linear: name == "1")
    assert model[0].activation_relu_or_gelu == 1


def test_vit_trains_and_packs(transformers) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    linears = kinds(model, nn.Linear)
    assert len(linears) == 2 * 6 + 1
    keys = list(model.state_dict())
    replace_linear(model)
    assert kinds(model, BitLinear) == linears
    assert list(model.state_dict()) == keys
    pixels, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(pixels).logits
        assert kinds(pack(model), PackedLinear) == linears
        error = (model(pixels).logits - expected).norm() / expected.norm()
    assert error < 1e-2  # an activation's code may flip; another weight anywhere would change all of it


def gpt2_config(transformers):
    return transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=1, n_head=2, num_labels=2,
                                   pad_token_id=0)  # fmt: skip


def test_gpt2_has_conv1d_and_is_refused(transformers) -> None:
    model = transformers.GPT2LMHeadModel(gpt2_config(transformers))
    head = model.lm_head
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*Conv1D"):
        replace_linear(model)
    assert model.lm_head is head
    assert head.weight is model.transformer.wte.weight


def test_gpt2_classifier_swaps_its_one_linear(transformers) -> None:
    model = replace_linear(transformers.GPT2ForSequenceClassification(gpt2_config(transformers)))
    assert kinds(model, BitLinear) == ["score"]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_keeps_its_head(transformers, tied: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = replace_linear(transformers.LlamaForCausalLM(config))
    assert len(kinds(model, BitLinear)) == 2 * 7
    assert kinds(model, nn.Linear) == ["lm_head"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(kinds(pack(model), PackedLinear)) == 2 * 7
    with torch.no_grad():
        assert model.eval().generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)


# what stays float


def test_one_warning_names_the_matrices_that_stay_float() -> None:
    lazy, old = nn.LazyLinear(4), torch.nn.utils.weight_norm(nn.Linear(8, 8))
    layers = [nn.MultiheadAttention(8, 2), nn.LSTM(8, 8), nn.GRU(8, 8), weight_norm(nn.Linear(8, 8)), lazy, old]
    model = nn.ModuleDict({str(i): layer for i, layer in enumerate([nn.Linear(8, 8), *layers, nn.Conv1d(8, 8, 3)])})
    with pytest.warns(UserWarning, match="leaves matrices in float") as caught:
        replace_linear(model)
    (warning,) = (each for each in caught if "leaves matrices" in str(each.message))
    for part in (
        "1 MultiheadAttention (1)", "(1.out_proj)", "1 LSTM (2)", "1 GRU (3)", "1 ParametrizedLinear (4)",
        "1 LazyLinear (5)", "1 Linear (6)", "1 Conv1d (7)", "give a filter if this is meant",
    ):  # fmt: skip
        assert part in str(warning.message)
    assert warning.filename == __file__
    assert kinds(model, BitLinear) == ["0"]


def test_nothing_is_said_where_nothing_is_left_or_a_filter_decides(recwarn: pytest.WarningsRecorder) -> None:
    tied = nn.ModuleDict({"table": nn.Embedding(5, 8), "fc": nn.Linear(8, 8), "norm": nn.LayerNorm((4, 8))})
    tied["lm_head"] = nn.Linear(8, 5)
    replace_linear(tied)
    replace_linear(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)), filter=lambda name, linear: True)
    assert not recwarn.list


def test_hooks_that_are_lost_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].register_forward_pre_hook(lambda module, inputs: None)
    with pytest.warns(UserWarning, match="hooks on 1 are gone"):
        replace_linear(model)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.warns(UserWarning, match="hooks on 0 are gone"):
        pack(model)
