"""Tasks of our own: what is asked, and what counts as right."""

import re
from pathlib import Path

import pytest
import torch

from bitnet.evaluation import definitions, grammar
from bitnet.evaluation.tasks import Accuracy, Question, Task, last_words, make_tasks
from bitnet.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(pair) for pair in grammar.pairs(400)], vocab_size=300)


def test_pairs_differ_in_a_word_and_every_rule_is_there() -> None:
    found = grammar.pairs(200)
    assert len(found) == len(set(found)) == 200
    assert found == grammar.pairs(200)
    for right, wrong in found:
        assert right != wrong
        a, b = right.split(), wrong.split()
        assert len(a) == len(b)
        assert sum(x != y for x, y in zip(a, b, strict=True)) == (2 if sorted(a) != a and set(a) == set(b) else 1) or (
            {w.strip(".") for w in a} == {w.strip(".") for w in b}
        )
    assert len(grammar.pairs(7)) == 7
    assert len(grammar.pairs(10**6)) > 1000
    for rule in grammar._RULES:
        assert len(set(rule()) & set(grammar.pairs(10 * len(grammar._RULES)))) >= 5


def wordnet(folder: Path, lines: list[str]) -> Path:
    (folder / "data.noun").write_text("  1 This software and database is being provided.\n" + "\n".join(lines))
    return folder


NOUNS = ["dog", "cat", "oak", "rose", "river", "hill"]


def test_definitions_are_read_as_wordnet_writes_them(tmp_path: Path) -> None:
    lines = [
        f'{i:08} 05 n 01 {noun} 0 001 @ 00001740 n 0000 | a thing of kind {i}; "a {noun} is here"'
        for i, noun in enumerate(NOUNS)
    ]
    lines += [
        "00000090 05 n 02 wolf 0 grey_wolf 0 000 | a word that is not alone here",
        "00000091 05 n 01 dog 1 000 | a second meaning of it",
        "00000092 05 n 01 lake 0 000 | a lake is a lake of water",
        "00000093 05 n 01 fox 0 000 | short",
    ]
    meanings = definitions.read_meanings(wordnet(tmp_path, lines))
    assert [(m.noun, m.definition) for m in meanings] == [(n, f"a thing of kind {i}") for i, n in enumerate(NOUNS)]
    asked = definitions.questions(meanings, 4)
    assert asked == definitions.questions(meanings, 4)
    own = {m.noun.capitalize() + ":": f" {m.definition}" for m in meanings}
    for text, ends in asked:
        assert ends[0] == own[text]
        assert len(set(ends)) == 4
    with pytest.raises(ValueError, match=r"data\.noun does not exist; give WordNet's folder"):
        definitions.read_meanings(tmp_path / "no")
    with pytest.raises(ValueError, match="has 1 nouns"):
        definitions.read_meanings(wordnet(tmp_path, lines[:1]))
    alike = [re.sub(r"kind \d", "one kind", line) for line in lines]  # of which no four can be asked
    with pytest.raises(ValueError, match="has 1 nouns with a definition of their own"):
        definitions.read_meanings(wordnet(tmp_path, alike))


def test_a_model_is_right_where_it_finds_the_first_text_likelier(tokenizer, tmp_path: Path) -> None:
    lines = [f"{i:08} 05 n 01 {noun} 0 000 | a thing of kind {i}" for i, noun in enumerate(NOUNS)]
    tasks = make_tasks(tokenizer, 64, 30, wordnet(tmp_path, lines))
    assert [(task.name, len(task.questions)) for task in tasks] == [("grammar", 30), ("definitions", 6)]
    assert make_tasks(tokenizer, 64, 0) == []
    assert not any(q for task in make_tasks(tokenizer, 3, 30, tmp_path) for q in task.questions)

    def knows(rows: list[tuple[int, ...]]):
        """A model that finds every next token of these texts likely, and no other."""

        def model(batch: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*batch.shape, 300)
            for b, ids in enumerate(batch.tolist()):
                for row in rows:
                    for t in range(1, len(row)):
                        if tuple(ids[:t]) == row[:t]:
                            logits[b, t - 1, row[t]] = 5.0
            return logits

        return model

    for task in tasks:
        right = task.accuracy(knows([q.rows[0] for q in task.questions]))
        assert right == Accuracy(1.0, 0.0, len(task.questions))
        assert task.accuracy(knows([q.rows[-1] for q in task.questions])).share == 0
        assert task.accuracy(lambda batch: torch.zeros(*batch.shape, 300)).share < 0.7
        for question in task.questions:
            assert all(row[: question.scored] == question.rows[0][: question.scored] for row in question.rows)
            assert len({row[question.scored] for row in question.rows}) > 1


def test_long_answers_are_not_worse_for_their_length() -> None:
    question = Question(((1, 2, 2, 2, 2), (1, 3)), 1, (4, 1))

    def model(batch):
        logits = torch.zeros(*batch.shape, 4)
        logits[..., 2] = 0.1
        return logits

    assert Task("t", [question]).accuracy(model).share == 1
    assert Task("t", [Question(question.rows, 1, None)]).accuracy(model).share == 0
    assert Accuracy.of(3, 4).error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert Task("t", []).accuracy(model) is None


def test_last_words_are_whole_tokens_at_the_ends_of_sentences(tokenizer) -> None:
    text = "The man takes the book. The men take the old house, and the boy sees the road. Then more of it."
    ids = tokenizer.encode(text)
    labels = torch.tensor([*ids[:3], -100, *ids[3:], -100, -100])
    found = last_words(labels, tokenizer)
    assert [tokenizer.decode(ids[first:behind]).strip() for first, behind in found] == ["road"]
    assert all(first >= 16 for first, _ in found)
    assert last_words(torch.tensor(ids[:5]), tokenizer) == []
