"""Many questions answered together: order, errors of one item, errors of the engine, closing."""

import pytest

from minigpt4.batch import Batch, PictureQuestion, greedy
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from tests.training_case import jpeg, picture, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def questions(count: int, damaged: int | None = None) -> list[PictureQuestion]:
    contents = [b"no picture" if i == damaged else jpeg(picture(i)) for i in range(count)]
    return [PictureQuestion(f"{i}.jpg", "What?", lambda c=c: c) for i, c in enumerate(contents)]


def test_a_bad_item_is_named_counted_and_left_out(model, capsys):
    with Batch(Engine(model), together=2) as batch:
        alone = [c.text for _, c in batch.answer(questions(4), greedy(5))]
        capsys.readouterr()
        found = dict(batch.answer(asked := questions(4, damaged=1), greedy(5)))
    assert [q.key for q in found] == ["0.jpg", "2.jpg", "3.jpg"]
    assert [c.text for c in found.values()] == [alone[0], *alone[2:]]
    assert batch.left_out == 1 and len(asked) == 4
    said = capsys.readouterr().err
    assert "1.jpg is left out" in said and "1 of 4 questions were left out." in said


def test_where_no_item_is_good_one_sentence_says_so(model):
    with Batch(Engine(model)) as batch, pytest.raises(UserError, match="None of the questions"):
        list(batch.answer(questions(1, damaged=0), greedy(5)))


def test_a_dialogue_may_ask_again_and_others_go_on(model):
    """It comes later, and has what it would have alone."""
    with Batch(Engine(model), together=2) as batch:

        def count(times: int):
            conversation = Conversation()
            texts = []
            for _ in range(times):
                conversation.add_question("And?")
                completion = yield ask(batch.engine, conversation, greedy(4))
                conversation.add_answer(completion.text)
                texts.append(completion.text)
            return texts

        found = dict(batch.run([3, 1, 2], count))
        assert list(found) == [1, 3, 2] or list(found) == [1, 2, 3]
        assert found[3][:2] == found[2] and found[2][:1] == found[1]


def test_an_error_of_the_engine_ends_the_job(model):
    engine = Engine(model)
    with pytest.raises(UserError) as caught, Batch(engine, 1) as batch:
        for _ in batch.answer(questions(3), greedy(5)):
            engine.close()
    assert caught.value.kind == "ending"


def test_leaving_early_closes_the_engine(model):
    with pytest.raises(ZeroDivisionError), Batch(engine := Engine(model)) as batch:
        for _ in batch.answer(questions(3), greedy(5)):
            raise ZeroDivisionError
    with pytest.raises(UserError):
        list(Batch(engine).answer(questions(1), greedy(5)))
