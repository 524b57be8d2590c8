"""Conversations as they are published: the forms, system messages, weights, and what is refused by its name."""

import json
import re

import pytest

from bitnet.data.chats import tokenize_chats
from bitnet.data.conversations import Conversation, read_conversations
from bitnet.data.feed import DataConfig, open_feed
from bitnet.data.tokens import IGNORE_INDEX
from bitnet.tokenizer import ChatTemplate
from bitnet.tokenizer.chat import PLAIN_TEMPLATE
from tests import oracles
from tests.conversations import chat


def say(*texts: str) -> list[dict]:
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


def read_one(tmp_path, record, field=None) -> Conversation | None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    ((_, conversation),) = read_conversations(tmp_path / "a.jsonl", field)
    return conversation


HI = say("hi", "hello")
SYSTEM = [{"role": "system", "content": "Be brief."}]
GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
FORMS = {
    "messages": ({"messages": HI, "id": 7, "source": "x"}, HI, [0, 1]),
    "nulls beside": ({"messages": HI, "conversations": None, "system": None, "tools": [], "weight": 1}, HI, [0, 1]),
    "null keys": ({"messages": [m | {"weight": None, "tool_calls": None, "name": ""} for m in HI]}, HI, [0, 1]),
    "sharegpt": ({"conversations": GPT, "id": "a"}, HI, [0, 1]),
    "sharegpt in messages": ({"messages": GPT}, HI, [0, 1]),
    "the first question twice": ({"messages": HI, "prompt": "hi ", "prompt_id": "7f"}, HI, [0, 1]),
    "both keys from parquet": ({"messages": [m | {"from": None, "value": None} for m in HI]}, HI, [0, 1]),
    "developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *HI]}, SYSTEM + HI, [0, 0, 1]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "hello", "image": None}]}]},
        HI, [0, 1],
    ),
    "prompt": ({"prompt": "hi", "completion": "hello"}, HI, [0, 1]),
    "prompt of messages": (
        {"prompt": say("a", "b", "c"), "completion": say("d", "e")[1:]}, say("a", "b", "c", "e"), [0, 0, 0, 1],
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, HI, [0, 1]),
    "alpaca with input": ({"instruction": "Say", "input": "hello", "output": "x"}, say("Say\n\nhello", "x"), [0, 1]),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be brief."},
        SYSTEM + say("a", "b", "c", "d"), [0, 0, 1, 0, 1],
    ),
    "merged table": ({"messages": None, "instruction": "hi", "input": None, "output": "hello"}, HI, [0, 1]),
    "weight 0": ({"messages": [HI[0], HI[1] | {"weight": 0}, *HI]}, HI + HI, [0, 0, 0, 1]),
    "weights as they come": (
        {"conversations": [GPT[0] | {"weight": 0}, GPT[1] | {"weight": 1.0}, GPT[0], GPT[1] | {"weight": False}]},
        HI + HI, [0, 1, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    record, messages, learnt = FORMS[name]
    assert read_one(tmp_path, record) == Conversation(messages, list(map(bool, learnt)))


@pytest.mark.parametrize("name", ["system", "system_prompt", "system-message", "systemPrompt", "System", "sys"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt", "alpaca"])
def test_system_messages_beside_the_messages(tmp_path, name, form):
    record, messages, learnt = FORMS[form]
    found = read_one(tmp_path, record | {name: "Be brief."})
    assert found == Conversation(SYSTEM + messages, [False, *map(bool, learnt)])


def test_a_system_message_that_is_there_twice(tmp_path):
    assert read_one(tmp_path, {"messages": SYSTEM + HI, "system": "Be brief."}).messages == SYSTEM + HI
    assert read_one(tmp_path, {"messages": HI, "system": "Be brief.", "sys": "Be brief."}).messages == SYSTEM + HI
    with pytest.raises(ValueError, match="'system' and another one among its messages"):
        read_one(tmp_path, {"messages": SYSTEM + HI, "system": "Be long."})
    with pytest.raises(ValueError, match="system and sys that is not one text"):
        read_one(tmp_path, {"messages": HI, "system": "Be brief.", "sys": "Be long."})


def with_key(key, value, which=1) -> dict:
    return {"messages": [m | ({key: value} if i == which else {}) for i, m in enumerate(HI)]}


REFUSED = {
    "weight 0.5": (with_key("weight", 0.5), "weight 0.5"),
    "weight 2": (with_key("weight", 2), "weight 2"),
    "weight '0'": (with_key("weight", "0"), "weight '0'"),
    "weight []": (with_key("weight", [0]), r"weight \[0\]"),
    "weight of the user": (with_key("weight", 1, 0), "message of the user with weight 1"),
    "tool calls": (with_key("tool_calls", [{"id": "x"}]), "field 'tool_calls'"),
    "tool calls and no content": ({"messages": [HI[0], HI[1] | {"content": None, "tool_calls": [1]}]}, "'tool_calls'"),
    "thoughts": (with_key("reasoning_content", "hm"), "field 'reasoning_content'"),
    "loss of a message": (with_key("loss", False), "field 'loss'"),
    "train of a message": (with_key("train", False), "field 'train'"),
    "name": (with_key("name", "Bob", 0), "field 'name'"),
    "prefix": (with_key("prefix", True), "field 'prefix'"),
    "both lists": ({"messages": HI, "conversations": GPT}, "both 'messages' and 'conversations'"),
    "a picture": (with_key("content", [{"type": "image_url", "image_url": {}}], 0), "part that is no text"),
    "a nested text": (with_key("content", {"text": "x"}), "content of type dict"),
    "a null content": (with_key("content", None), "content of type NoneType"),
    "a number": (with_key("content", 5), "content of type int"),
    "messages as a text": ({"messages": "hi"}, "no list of messages in 'messages' but 'hi'"),
    "messages as an object": ({"messages": {"role": "user"}}, "no list of messages"),
    "label": ({"prompt": "a", "completion": "b", "label": False}, "label false"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen'"),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' that is no list"),
    "a nested instruction": ({"instruction": {"a": 1}, "output": "b"}, "instruction or input that is no text"),
    "csv-like": ({"question": "a", "answer": "b"}, r"no conversation.*\['answer', 'question'\].*Alpaca.*--data.field"),
} | {
    name: ({"messages": HI, name: value}, f"field '{name}'")
    for name, value in {
        "tools": [{"type": "function"}], "functions": [{}], "images": ["a.png"], "weight": 0.5, "weights": [0, 1],
        "sample_weight": 2, "loss_mask": [0, 1], "train_on_inputs": True, "documents": ["x"], "mask": "user",
        "chat_template": "{{ x }}", "context": "x", "function_call": "auto", "trainMask": [1], "loss": [0, 1],
        "parallel_tool_calls": False, "prompt": "other", "instruction": "Be brief.",
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_dropped_is_refused_by_name(tmp_path, name):
    record, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"line 1 .*{message}"):
        read_one(tmp_path, record)


def test_other_names_of_the_list(tmp_path):
    assert read_one(tmp_path, {"dialog": HI, "messages": say("x")}, "dialog").messages == HI
    with pytest.raises(ValueError, match=r"no conversation.*\['dialog'\].*--data.field"):
        read_one(tmp_path, {"dialog": HI})
    with pytest.raises(ValueError, match="no conversation"):
        read_one(tmp_path, {"messages": HI}, "dialog")


@pytest.mark.parametrize(
    "record",
    [{"messages": None}, {"messages": []}, {"prompt": "a", "completion": None}, {"instruction": "a", "output": ""}],
)
def test_records_with_nothing_in_them_are_skipped(tmp_path, record):
    assert read_one(tmp_path, record) is None


def test_every_layout_and_parquet(tmp_path, chat_tokenizer):
    pa = oracles.require("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"messages": say(f"hi {i}", f"hello {i}")} for i in range(6)]
    rows += [{"messages": None}, {"messages": say("no answer")}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.txt").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "weight": pa.int64()})),
        "system": pa.string(),
    })), tmp_path / "c.parquet")  # fmt: skip
    found = [[c for _, c in read_conversations(path)] for path in sorted(tmp_path.iterdir())]
    assert found[0] == found[1] == found[2]
    assert [c and len(c.messages) for c in found[0]] == [2] * 6 + [None, 1]
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "a.json").rename(folder / "a.json")
    (tmp_path / "c.parquet").rename(folder / "c.parquet")
    (tmp_path / "b.txt").rename(folder / "b.txt")
    data = DataConfig(chat=str(folder), cache=str(tmp_path / "data"))
    feed = open_feed(data, chat_tokenizer, ChatTemplate(PLAIN_TEMPLATE, chat_tokenizer), window=64)
    words = feed.describe()
    for what in ("12 conversations", "2 left out (no answer)", "2 left out (no conversation in the record)",
                 "1 files of the folder left out (1 .txt)"):  # fmt: skip
        assert what in words
    (folder / "b.txt").write_text("plain words")
    with pytest.raises(ValueError, match="is plain text, not conversations"):
        list(read_conversations(folder / "b.txt"))


def test_what_weighs_nothing_is_read_and_not_learnt(tmp_path, chat_tokenizer):
    template = ChatTemplate(PLAIN_TEMPLATE, chat_tokenizer)
    wrong = chat("2+2?", "five", "no", "four")
    wrong[1] |= {"weight": 0}
    silent = chat("2+2?", "five")
    silent[1] |= {"weight": 0}
    records = [{"messages": messages} for messages in (wrong, silent, chat("hi", "hello"))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    chats = tokenize_chats(tmp_path / "a.jsonl", template, tmp_path / "data")
    assert chats.meta["unanswered"] == 1
    texts = []
    for split in ("train", "val"):
        input_ids, labels, _ = chats.rows(split, 64).read([0])
        texts.append((chat_tokenizer.decode(input_ids[0].tolist()),
                      chat_tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())))  # fmt: skip
    texts.sort(key=lambda pair: len(pair[1]))
    assert [learnt for _, learnt in texts] == ["four", "hello"]
    assert re.search("five.*no", texts[0][0])


def test_cases_of_a_weight_and_a_system_field(tmp_path):
    weighed = {"messages": [*say("2+2?", "5"), *say("no", "4")]}
    weighed["messages"][1]["weight"] = 0
    weighed["messages"][3]["weight"] = 1
    assert read_one(tmp_path, weighed).learnt == [False, False, False, True]
    french = {"system": "Answer in French.", "messages": say("hi", "salut")}
    assert read_one(tmp_path, french).messages[0] == {"role": "system", "content": "Answer in French."}
