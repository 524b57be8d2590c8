"""The server as OpenAI's own Python client sees it: completions, chats, streams, tools, JSON schemas, errors."""

import dataclasses
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from bitnet.inference.cpu_engine import Engine
from bitnet.inference.text_model import TextModel
from bitnet.kernels.cpu import native
from bitnet.serving.errors import ApiError, plain_name
from bitnet.serving.jobs import SLACK
from tests import oracles
from tests.builders import tiny_model
from tests.kernels.builders import NOT_BUILT
from tests.serving.builders import Source, running

openai = oracles.require("openai")
httpx = oracles.require("httpx")
PROMPT = "def wrap(text"
SLOW = [{"role": "user", "content": "slow"}]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say <s> something"}]
TOO_LARGE = {"type": "function", "function": {"name": "f", "arguments": '{"days": -1e999}'}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": '{"days": NaN}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_a_completion_is_the_texts_of_the_python_api(client, model):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0.8, top_p=0.9, seed=5)
    wanted = model.generate(PROMPT, max_new_tokens=20, temperature=0.8, top_p=0.9, min_p=0, seed=5)
    assert answer.choices[0].text == wanted.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (wanted.prompt_tokens, wanted.new_tokens)
    ids = model.encode(PROMPT)
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=20, temperature=0.8, top_p=0.9, seed=5)
    assert again.choices[0].text == wanted.text


def test_a_stream_joins_to_the_answer(client):
    options = {"model": "tiny", "prompt": [PROMPT, "import"], "max_tokens": 12, "seed": 4, "n": 2, "logprobs": 2}
    whole = client.completions.create(**options)
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    usage = None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert usage.total_tokens == whole.usage.total_tokens


def test_prompts_of_one_request_draw_numbers_of_their_own(client):
    """Every prompt had the request's seed: three times the same prompt, without a seed, gave three times one text."""
    options = {"model": "tiny", "max_tokens": 12, "seed": 4}
    texts = [choice.text for choice in client.completions.create(prompt=[PROMPT] * 2, n=2, **options).choices]
    assert texts == [choice.text for choice in client.completions.create(prompt=PROMPT, n=4, **options).choices]
    assert len(set(texts)) == 4


def test_an_answer_is_as_long_as_there_is_memory_for(model):
    """Whoever named no length was refused where the longest text of the context did not fit the cache."""
    with (
        running(model, cache_tokens=400) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as own,
    ):
        asked = {"model": "tiny", "messages": CHAT, "extra_body": {"ignore_eos": True}}
        usage = own.chat.completions.create(**asked).usage
        assert usage.total_tokens == 400 - 2 * SLACK
        of_two = own.chat.completions.create(**asked, n=2).usage
        assert 0 < of_two.completion_tokens <= 400 - 3 * SLACK - of_two.prompt_tokens
        assert own.responses.create(model="tiny", input="Hi").usage.total_tokens <= 400 - 2 * SLACK
        with pytest.raises(openai.BadRequestError, match="memory for"):
            own.chat.completions.create(**asked, max_tokens=400)


def test_echo_scores_a_text(client, model):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    ids = model.encode(PROMPT)
    assert choice.text == PROMPT
    assert len(choice.logprobs.tokens) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert all(
        max(top.values()) >= value
        for top, value in zip(choice.logprobs.top_logprobs[1:], choice.logprobs.token_logprobs[1:], strict=True)
    )
    starts = choice.logprobs.text_offset
    assert [PROMPT[a:b] for a, b in zip(starts, [*starts[1:], len(PROMPT)], strict=True)][1:] == [
        token if index else token.lstrip() for index, token in enumerate(choice.logprobs.tokens[1:])
    ]
    longer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, echo=True, logprobs=1, seed=1)
    assert longer.choices[0].text.startswith(PROMPT)
    assert longer.choices[0].logprobs.token_logprobs[: len(ids)] == choice.logprobs.token_logprobs


def test_best_of_gives_the_likeliest(client):
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 2, "logprobs": 0}
    every = client.completions.create(**options, n=5).choices
    best = client.completions.create(**options, n=2, best_of=5).choices

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert [c.text for c in best] == [c.text for c in sorted(every, key=mean, reverse=True)[:2]]


def test_a_chat_and_its_stream(client, model):
    options = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 16, "seed": 3}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    wanted = model.generate(CHAT, max_new_tokens=16, temperature=0.9, top_p=1, min_p=0, seed=3)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", wanted.text)
    assert whole.usage.prompt_tokens == wanted.prompt_tokens
    found = whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in found).decode(errors="replace").strip() == wanted.text.strip()
    assert all(len(token.top_logprobs) == 3 for token in found)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == chunks[-1].usage.model_copy(update={"total_tokens": whole.usage.total_tokens})
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_bias_and_stops(client, model):
    token = model.source.tokenizer.encode("x")[-1]
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 4}
    biased = client.chat.completions.create(**options, logit_bias={str(token): 100}, stop=["xxx"])
    assert biased.choices[0].message.content == ""
    assert biased.choices[0].finish_reason == "stop"
    biased = client.chat.completions.create(**options, logit_bias={str(token): 100})
    assert biased.choices[0].message.content == "xxxx"


@pytest.mark.parametrize("stream", [False, True])
def test_json_keeps_to_its_schema(client, stream):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "color": {"enum": ["red", "blue"]}},
        "required": ["ok", "color"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    options = {"model": "tiny", "messages": CHAT, "response_format": form, "seed": 1, "temperature": 1.5}
    if stream:
        chunks = client.chat.completions.create(**options, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        answer = client.chat.completions.create(**options)
        assert answer.choices[0].finish_reason == "stop"
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert value["color"] in ("red", "blue")
    assert isinstance(value["ok"], bool)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wanted", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is(client, stream, wanted):
    options = {"model": "tiny", "messages": CHAT, "tools": [TOOL], "tool_choice": wanted, "seed": 1}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert chunks[-1].finish_reason == "tool_calls"
    else:
        answer = client.chat.completions.create(**options)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls"
        turn = [*CHAT, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
        client.chat.completions.create(model="tiny", messages=turn, tools=[TOOL], max_tokens=1)
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 3


def test_responses(client, model):
    wanted = model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=1, temperature=0)
    options = {"model": "tiny", "input": "Hi", "max_output_tokens": 1, "temperature": 0}
    answer = client.responses.create(**options)
    assert answer.output_text == wanted.text
    assert answer.status == "incomplete"
    assert answer.usage.input_tokens == wanted.prompt_tokens
    assert (answer.temperature, answer.top_p) == (0, 1)
    own = client.responses.create(model="tiny", input="Hi", max_output_tokens=1)
    assert own.temperature == 0.9  # what the model's makers say
    cut = list(client.responses.create(**options, stream=True))
    assert cut[0].type == "response.created"
    assert cut[-1].type == "response.incomplete"
    assert cut[-1].response.output_text == wanted.text
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "thing", "schema": schema}}
    with client.responses.stream(model="tiny", input="Hi", text=form) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert final.status == "completed"
    assert final.output_text == "".join(deltas)
    assert isinstance(json.loads(final.output_text)["ok"], bool)
    turn = [{"role": "user", "content": "Hi"}, answer.output[0].to_dict(), {"role": "user", "content": "More"}]
    again = client.responses.create(model="tiny", input=turn, max_output_tokens=2, instructions="Be brief.")
    assert again.usage.input_tokens > answer.usage.input_tokens


class LogitsAlone:
    """An engine that gives no hidden states."""

    def __init__(self, model) -> None:
        self.model, self.config, self.device = model, model.config, model.device

    def __call__(self, *arguments, **options):
        return self.model(*arguments, **options)

    def new_cache(self, *arguments):
        return self.model.new_cache(*arguments)


@pytest.mark.parametrize("native_engine", [False, True])
def test_embeddings_are_the_mean_of_the_last_layer(tokenizer, native_engine):
    if native_engine and not native.instruction_sets():
        pytest.skip(NOT_BUILT)
    torch_model = tiny_model(vocab_size=tokenizer.vocab_size).pack()
    engine = Engine.from_model(torch_model) if native_engine else torch_model
    with (
        running(TextModel(engine, Source(tokenizer))) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as own,
    ):
        texts = ["def wrap(text", "import os", "def wrap(texts"]
        found = own.embeddings.create(model="tiny", input=texts)  # as base64
        vectors = torch.tensor([one.embedding for one in found.data])
        plain = own.embeddings.create(model="tiny", input=texts[0], encoding_format="float").data[0].embedding
        with pytest.raises(openai.BadRequestError, match="at most 128"):
            own.embeddings.create(model="tiny", input=[[5] * 200])
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode(texts[0], bos=tokenizer.adds_bos)])
        wanted = torch.nn.functional.normalize(torch_model.model(ids, None)[0].mean(0), dim=0)
    torch.testing.assert_close(vectors[0], wanted)
    torch.testing.assert_close(torch.tensor(plain), wanted)
    similarity = vectors @ vectors.T
    assert similarity[0, 2] > similarity[0, 1]


def test_texts_of_a_request_that_is_refused_are_not_computed(served, monkeypatch):
    """They stayed in the queue: a request for more vectors than may wait filled it for everybody."""
    address, application = served
    waiting: list[Future] = []

    def embed(ids: list[int]) -> Future:
        if len(waiting) == 2:
            raise ApiError(429, "2 texts wait already; ask again later", code="queue_full")
        waiting.append(Future())
        return waiting[-1]

    monkeypatch.setattr(application.models.find("tiny").scheduler, "embed", embed)
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": ["a", "b", "c"]})
    assert answer.status_code == 429
    assert [future.cancelled() for future in waiting] == [True, True]


def test_no_text_is_computed_where_one_is_too_long(served, monkeypatch):
    address, application = served
    scheduler = application.models.find("tiny").scheduler
    monkeypatch.setattr(scheduler, "embed", lambda _: pytest.fail("a text was computed"))
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": [[5]] * 20 + [[5] * 2000]})
    assert answer.status_code == 400
    assert "a text has 2000 tokens; at most" in answer.json()["error"]["message"]


def test_vectors_that_take_too_long_are_given_up(served, monkeypatch):
    address, application = served
    scheduler = application.models.find("tiny").scheduler
    waiting: list[Future] = []

    def embed(ids: list[int]) -> Future:
        waiting.append(Future())  # which nobody computes
        return waiting[-1]

    monkeypatch.setattr(scheduler, "embed", embed)
    monkeypatch.setattr(scheduler, "limits", dataclasses.replace(scheduler.limits, request_seconds=0.1))
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": ["a", "b"]}, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert [future.cancelled() for future in waiting] == [True, True]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/completions", {"prompt": "slow", "max_tokens": 1}), ("v1/embeddings", {"input": "slow"}),
        ("tokenize", {"prompt": "slow"}), ("v1/chat/completions", {"messages": SLOW, "max_tokens": 1}),
        ("tokenize", {"messages": SLOW}), ("v1/responses", {"input": "slow", "max_output_tokens": 1}),
    ],
)  # fmt: skip
def test_a_prompt_that_takes_long_to_encode_holds_nobody_up(served, monkeypatch, path, body):
    address, application = served
    tokenizer = application.models.find("tiny").tokenizer
    begun, end, encode = threading.Event(), threading.Event(), type(tokenizer).encode_batch

    def slow(self, texts, threads=1):
        if any("slow" in text for text in texts):
            begun.set()
            assert end.wait(60)
        return encode(self, texts, threads)

    monkeypatch.setattr(type(tokenizer), "encode_batch", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{address}/{path}", json=body, timeout=120)
        try:
            assert begun.wait(60)
            assert httpx.get(f"{address}/health", timeout=30).status_code == 200
            assert not asked.done()
        finally:
            end.set()
        assert asked.result().status_code == 200


def test_a_request_for_many_texts_leaves_room_in_the_queue(served, monkeypatch):
    """Clients send a thousand texts at once; each of them counted as a request of the queue, and 128 were the most."""
    address, application = served
    scheduler = application.models.find("tiny").scheduler
    embed, waited = scheduler.embed, list[int]()

    def watched(ids: list[int]) -> Future:
        future = embed(ids)
        waited.append(len(scheduler._texts))
        return future

    monkeypatch.setattr(scheduler, "embed", watched)
    texts = [[5, 6, 7 + number % 40] for number in range(300)]
    data = httpx.post(f"{address}/v1/embeddings", json={"input": texts}, timeout=60).json()["data"]
    assert [one["index"] for one in data] == [*range(300)]
    assert max(waited) <= 16
    assert data[0]["embedding"] == data[40]["embedding"] != data[1]["embedding"]
    answer = httpx.post(f"{address}/v1/embeddings", json={"input": [[5]] * 2049})
    assert answer.status_code == 400
    assert "2048 of one request" in answer.json()["error"]["message"]


def test_embeddings_need_hidden_states(tokenizer):
    engine = LogitsAlone(tiny_model(vocab_size=tokenizer.vocab_size).pack())
    with (
        running(TextModel(engine, Source(tokenizer))) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as own,
        pytest.raises(openai.InternalServerError, match="logits alone"),
    ):
        own.embeddings.create(model="tiny", input="x")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"extra_body": {"top_a": 1}}, "top_a", "unknown field"),
        ({"extra_body": {"stream_options": {"speed": 1}, "stream": True}}, "stream_options.speed", "unknown field"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"temperature": 3}, "temperature", "less than or equal"),
        ({"seed": "x"}, "seed", "integer"),
        ({"max_tokens": 1000}, "max_tokens", "512"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt": [[5, 9999]]}, "prompt", "9999"),
        ({"n": 3, "best_of": 2}, None, "at least n"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "9999"),
        ({"n": 100}, "n", "64"),
        ({"best_of": 100}, "best_of", "64"),
        ({"prompt": ["x"] * 129}, "prompt", "128 of one request"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
    ],
)
def test_bad_completions_are_named(client, changes, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as raised:
        client.completions.create(**{"model": "tiny", "prompt": "x", **changes})
    assert (raised.value.param or None) == param
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}}, "schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "nobody"),
        ({"tool_choice": "required"}, "no tools"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALLED, "id": "x"}]}]},
            "f are not JSON: NaN is no JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**TOO_LARGE, "id": "x"}]}]},
            "f are not JSON: -1e999 is too large a number",
        ),
    ],
)
def test_bad_chats_are_named(client, changes, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, "max_tokens": 2, **changes})


@pytest.mark.parametrize(
    ("path", "changes", "param", "words"),
    [
        ("completions", {"prompt": 5}, "prompt", "valid string"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": ["a", 5]}, "prompt[1]", "valid string"),
        ("completions", {"prompt": "x", "stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
        ("completions", {"prompt": "x " * 600}, "prompt", "together at most 512"),
        ("chat/completions", {"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ("chat/completions", {"max_completion_tokens": 1000}, "max_completion_tokens", "together at most 512"),
        ("chat/completions", {"max_tokens": 1000}, "max_tokens", "together at most 512"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x " * 600}]}, "messages", "at most 512"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "",
        ),
        ("responses", {"input": "Hi", "max_output_tokens": 1000}, "max_output_tokens", "together at most 512"),
        ("responses", {"input": "x " * 600}, "input", "together at most 512"),
    ],
)
def test_an_error_names_the_field_that_the_client_sent(address, path, changes, param, words):
    """A field of several kinds was named with the first kind that was tried ("prompt.str"), and whatever was too long
    was max_tokens."""
    body = ({"messages": CHAT} if path.startswith("chat") else {}) | changes
    answer = httpx.post(f"{address}/v1/{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind"), [("{", "application/json"), ("", "application/json"), ("{}", "text/plain")]
)
def test_a_body_that_is_no_json_object_is_told_so(address, content, kind):
    answer = httpx.post(f"{address}/v1/completions", content=content, headers={"Content-Type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, None)
    assert error["message"].startswith("the body cannot be read as a JSON object")


def test_what_has_no_utf8_is_told_again_as_it_came(address):
    """Half of a pair of UTF-16, in what is not read as text: the answer failed, and with it the connection."""
    half = "\\ud800"
    body = f'{{"input": "hi", "max_output_tokens": 2, "metadata": {{"{half}": "a{half}"}}}}'
    named = f'{{"format": {{"type": "json_schema", "name": "{half}", "schema": {{}}}}}}'
    with httpx.Client(base_url=address, headers={"content-type": "application/json"}) as http:
        for _ in range(2):  # on one connection
            answer = http.post("/v1/responses", content=body)
            assert answer.status_code == 200
            assert answer.json()["metadata"] == {"\ud800": "a\ud800"}
            answer = http.post("/v1/responses", content=f'{{"input": "hi", "max_output_tokens": 2, "text": {named}}}')
            assert answer.json()["text"]["format"]["name"] == "\ud800"
        answer = http.post("/v1/responses", content=body.replace(half, "\u00e9"))
        assert "\u00e9" in answer.text  # nothing else is escaped


def test_places_in_a_body():
    assert plain_name(("messages", 0, "content", "text")) == "messages[0].content.text"
