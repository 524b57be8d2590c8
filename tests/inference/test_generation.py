"""The decode loop, and the text it makes."""

import itertools
import re

import pytest
import torch

from bitnet.inference.generation import (
    FILLER,
    GenerationStats,
    SamplingConfig,
    TextStream,
    generate,
    limit_new_tokens,
)
from bitnet.model import pack
from bitnet.tokenizer import Tokenizer
from tests.builders import expected_text, generate_ids, tiny_model

GREEDY = SamplingConfig(temperature=0)


def byte_id(tokenizer: Tokenizer, value: int) -> int:
    """The token that stands for one byte."""
    return tokenizer._sp.piece_to_id(f"<0x{value:02X}>")


# The decode loop


@pytest.mark.parametrize("quantizer", ["none", "ternary"])
def test_greedy_is_the_argmax_of_full_forward_passes(quantizer):
    model = tiny_model(quantizer)
    if quantizer == "ternary":
        pack(model)
    prompt = torch.randint(0, 512, (2, 7))
    new = generate_ids(model, prompt, 30)
    assert new.shape == (2, 30)
    ids = torch.cat([prompt, new], 1)
    equal = 0
    with torch.inference_mode():
        for t in range(7, ids.shape[1]):
            logits = model(ids[:, :t])[:, -1]  # no cache
            equal += int((logits.argmax(-1) == ids[:, t]).sum())
            # Cached and whole passes differ by rounding, and rounding may flip an int8 activation: what was chosen is
            # among the best by a margin that a wrong position or mask would exceed by far.
            lead = logits.amax(-1) - logits.gather(-1, ids[:, t : t + 1])[:, 0]
            assert (lead <= (1e-4 if quantizer == "none" else 0.1 * logits.std())).all(), f"token {t}: {lead}"
    assert equal >= (60 if quantizer == "none" else 54)


def test_float64_greedy_equals_the_loop_without_cache():
    model = tiny_model("none").double()
    prompt = torch.randint(0, 512, (1, 5))
    ids = prompt
    with torch.inference_mode():
        for _ in range(40):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate_ids(model, prompt, 40), ids[:, 5:])


def test_the_seed_decides():
    model = pack(tiny_model())
    prompt = torch.randint(0, 512, (3, 4))
    config = SamplingConfig(temperature=1.5, top_p=0.95)
    first = generate_ids(model, prompt, 12, config, seed=1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(generate_ids(model, prompt, 12, config, seed=1), first)
    assert not torch.equal(generate_ids(model, prompt, 12, config, seed=2), first)


def test_samples_of_one_prompt_differ():
    prompt = torch.tensor([[1, 2, 3]]).expand(4, -1)
    rows = generate_ids(tiny_model(), prompt, 8, SamplingConfig(1.0), seed=0).tolist()
    assert len({tuple(row) for row in rows}) == 4


def test_greedy_rows_do_not_depend_on_their_neighbours():
    model = tiny_model("none").double()
    prompt = torch.randint(0, 512, (3, 6))
    together = generate_ids(model, prompt, 10)
    assert torch.equal(together, torch.cat([generate_ids(model, row[None], 10) for row in prompt]))


def test_repetition_penalty_counts_prompt_and_generated_tokens():
    # Under a huge penalty every token of a float model's text is new, as long as one is left.
    model = tiny_model("none", vocab_size=40)
    prompt = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    ids = torch.cat([prompt, generate_ids(model, prompt, 20, SamplingConfig(0, repetition_penalty=1e6))], 1)
    with torch.inference_mode():
        for row, t in itertools.product(range(2), range(4, 24)):
            logits = model(ids[row : row + 1, :t])[0, -1]
            unseen = [i for i in range(40) if i not in ids[row, :t].tolist()]
            if (logits[unseen] > 1e-3).any():
                assert ids[row, t] in unseen


def test_rows_end_at_eos_and_then_yield_filler():
    model = tiny_model("none").double()
    prompt = torch.randint(0, 512, (2, 5))
    free = generate_ids(model, prompt, 30)
    # A token of row 0's text that row 1 meets later or never.
    position, eos = next((i, t) for i, t in enumerate(free[0].tolist()) if t not in free[1, : i + 1])
    stats = GenerationStats()
    ended = generate_ids(model, prompt, 30, eos_id=eos, stats=stats)
    assert ended[0, : position + 1].tolist() == free[0, : position + 1].tolist()
    assert set(ended[0, position + 1 :].tolist()) == {FILLER}
    assert torch.equal(ended[1], free[1][: ended.shape[1]])
    assert stats.new_tokens == int((ended != FILLER).sum())
    alone = generate_ids(model, prompt[:1], 30, eos_id=eos)
    assert alone.tolist() == [free[0, : position + 1].tolist()]  # stops when all rows have
    # Of several ends the first one counts.
    later = free[0, position + 1 :].tolist()
    several = generate_ids(model, prompt[:1], 30, eos_id=(*later, eos))
    assert several.shape[1] <= position + 1
    assert int(several[0, -1]) in {*later, eos}
    assert not {*later, eos} & set(several[0, :-1].tolist())
    assert torch.equal(generate_ids(model, prompt, 30, eos_id=()), free)


def test_padded_rows_of_the_head_are_never_drawn():
    config = SamplingConfig(temperature=50.0, repetition_penalty=1.1)
    new = generate_ids(tiny_model(), torch.tensor([[5]] * 8), 20, config, vocab_size=10)
    assert int(new.max()) < 10


def test_generation_fills_the_positions_and_no_more():
    model = tiny_model(max_position_embeddings=32)
    assert generate_ids(model, torch.ones(1, 20, dtype=torch.int64), 100).shape == (1, 12)
    assert generate_ids(model, torch.ones(1, 31, dtype=torch.int64), 100).shape == (1, 1)
    assert limit_new_tokens(model.config, 20, 100) == 12
    assert limit_new_tokens(model.config, 20, 12) == 12
    with pytest.raises(
        ValueError, match=r"prompt of 32 tokens leaves no room in a model of 32 positions; .* 31 tokens"
    ):
        generate_ids(model, torch.ones(1, 32, dtype=torch.int64), 1)


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt has no tokens"),
        (torch.zeros(4, dtype=torch.int64), {}, r"int64 of shape \[4\]; give int64 \[batch, tokens\]"),
        (torch.zeros(1, 4), {}, "float32 of shape"),
        (torch.tensor([[1, 512]]), {}, r"token id 512 is outside the vocabulary \(0 to 511\); encode"),
        (torch.tensor([[-1, 5]]), {}, "token id -1 is outside"),
        (torch.tensor([[1]]), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (torch.tensor([[1]]), {"seed": -5}, "seed is -5"),
        (torch.tensor([[1]]), {"vocab_size": 513}, "vocab_size is 513; the model's is 512"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(ids, changes, message):
    arguments = {"max_new_tokens": 5, "sampling": GREEDY, "seed": 0, **changes}
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), ids, **arguments)


@pytest.mark.parametrize("changes", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_diverged_model_is_named(changes):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    text = generate(
        model, torch.tensor([[1, 2]]), max_new_tokens=5, sampling=SamplingConfig(**changes), seed=0
    )  # fmt: skip
    with pytest.raises(ValueError, match="logits are not finite after 2 tokens"):
        list(text)


def test_consumers_do_not_run_in_inference_mode():
    for _ in generate(tiny_model(), torch.tensor([[1, 2]]), max_new_tokens=3, sampling=GREEDY, seed=0):
        assert not torch.is_inference_mode_enabled()


def test_stats_count_tokens_and_bytes():
    model = tiny_model()
    config = model.config
    stats = GenerationStats()
    generate_ids(pack(model), torch.ones(3, 5, dtype=torch.int64), 7, stats=stats)
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_tokens, stats.decode_steps) == (15, 21, 18, 6)
    assert stats.prefill_seconds > 0
    assert stats.decode_rate == pytest.approx(18 / stats.decode_seconds)
    assert stats.prefill_rate == pytest.approx(15 / stats.prefill_seconds)
    # By hand: every row of q, k, v, o, gate, up and down fits one block of 32 bytes; a float32 scale per matrix.
    packed = config.num_hidden_layers * ((64 + 32 + 32 + 64 + 128 + 128 + 64) * 32 + 7 * 4)
    norms = 4 * (config.num_hidden_layers * (64 + 64 + 64 + 128) + 64)
    weights = packed + norms + 4 * 512 * 64  # the embedding once, as the head
    cached = [2 * config.num_hidden_layers * 3 * 32 * 4 * length for length in range(6, 12)]
    assert stats.bytes_read == 6 * weights + sum(cached)
    assert stats.bandwidth == pytest.approx(stats.bytes_read / stats.decode_seconds / 1e9)
    assert stats.bytes_per_token == stats.bytes_read / 18
    assert re.fullmatch(r"prefill 15 tokens \d+ tok/s \| decode 21 tokens \d+ tok/s \d+\.\d\d GB/s", str(stats))
    assert "decode 0 tokens 0 tok/s 0.00 GB/s" in str(GenerationStats())


def test_weight_bytes_leave_out_an_untied_embedding_table():
    tied, untied = (tiny_model(tie_word_embeddings=tie) for tie in (True, False))
    assert tied.weight_bytes() == untied.weight_bytes() == sum(4 * p.numel() for p in tied.parameters())


STOPS = [[], ["\n\n"], ["."], ["abcd", "bc"], ["cd", "abcd", "bcd"], ["dé\n", "€"], ["aab"], ["🙂🙃"], ["absent"]]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize(
    "text", ["xx abcd yy", "aaab", "aaabab\n\nc", "d\né. dé €", "🙂🙂🙃 end", "no match at al", "ends with ab", ""]
)
def test_stop_strings_across_any_token_borders(tokenizer, text, stop):
    # As the tokenizer cuts it, and one byte per token: every stop string then spans several tokens.
    as_encoded = tokenizer.encode(text)
    as_bytes = [byte_id(tokenizer, b) for b in text.encode()]
    for ids in (as_encoded, as_bytes):
        stream = TextStream(tokenizer, stop)
        assert "".join([*map(stream.push, ids), stream.close()]) == expected_text(text, stop)


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    stream = TextStream(tokenizer, stop=["END"])
    pieces = [stream.push(byte_id(tokenizer, b)) for b in "aENé".encode()]
    assert pieces == ["a", "", "", "", "ENé"]  # "EN" could become END, half of "é" could be anything
    assert [stream.push(byte_id(tokenizer, b)) for b in b"EN"] == ["", ""]
    assert not stream.finished
    assert stream.close() == "EN"
    assert stream.finished
    assert stream.push(byte_id(tokenizer, 65)) == stream.close() == ""


def test_end_of_text_and_filler_close_the_stream(tokenizer):
    for end in (tokenizer.eos_id, FILLER):
        stream = TextStream(tokenizer, stop=["tt"])
        text = "".join(stream.push(i) for i in [*tokenizer.encode("it"), end, *tokenizer.encode("more")])
        assert (text, stream.finished) == ("it", True)


def test_every_end_of_a_turn_closes_the_stream(tokenizer):
    chatty = Tokenizer(tokenizer.model_proto, ends=(40, 41))
    for end in (chatty.eos_id, 40, 41):
        stream = TextStream(chatty)
        text = "".join(stream.push(i) for i in [*chatty.encode("it"), end, *chatty.encode("more")])
        assert (text, stream.finished) == ("it", True)


def test_an_unfinished_character_is_replaced(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.push(byte_id(tokenizer, 0xE2)) + stream.close() == "\ufffd"


def test_bad_stop_strings(tokenizer):
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(tokenizer, ["a", ""])
    with pytest.raises(TypeError, match="one string"):
        TextStream(tokenizer, "ab")


def test_prompts_of_any_lengths_with_options_and_seeds_of_their_own():
    model = tiny_model("none").double()
    prompts = [[1, 2, 3], [5], list(range(20, 40))]
    samplings = [GREEDY, SamplingConfig(1.2), SamplingConfig(0.9, top_p=0.8, frequency_penalty=0.3)]
    rows = generate_ids(model, prompts, 9, samplings, seed=[4, 4, 8])
    for row, (prompt, sampling, seed) in enumerate(zip(prompts, samplings, [4, 4, 8], strict=True)):
        assert torch.equal(generate_ids(model, [prompt], 9, sampling, seed=seed), rows[row : row + 1])
    batch = torch.randint(0, 512, (3, 4))
    together = generate_ids(model, batch, 9, SamplingConfig(1.5), seed=6)  # row i has the seed 6 + i
    for row in range(3):
        assert torch.equal(
            generate_ids(model, batch[row : row + 1], 9, SamplingConfig(1.5), seed=6 + row)[0], together[row]
        )
    with pytest.raises(ValueError, match="3 prompts, 1 samplings and 3 seeds"):
        generate(model, prompts, max_new_tokens=2, sampling=[GREEDY], seed=0)
