"""What a writer answered is kept: a cut stage pays for nothing twice and ends in the same rows, whoever the writer is."""

import json
import os
import signal
import time

import pytest
import torch

from tests import toy
from tests.awaited import awaited
from tests.endpoint import Endpoint, completion
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core import endpoint as wire
from tutelage.core import writing
from tutelage.core.run import run_graph
from tutelage.core.types import Answer, Question
from tutelage.core.writing import LEDGER, Ledger, spoken
from tutelage.modalities.text import answers, models, tokenizer
from tutelage.modalities.text.template import FALLBACK
from tutelage.planning import plan

TELL = {"use": "synth/rephrase", "styles": ["one"], "prompts": {"one": "Tell:"}, "shortest": 1, "least": 0, "most": 99}
LIMIT = 60  # documents of the toy's source `b` that are told


@pytest.fixture
def endpoints():
    made = []

    def make(reply):
        made.append(Endpoint(reply))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(writing, "FIRST_WAIT", 0.01)


def graph(folder, *, start=None, seed=0, **more):
    """Stages `one` and `told`, which tells the first documents of `b`."""

    def change(recipe):
        path = folder / "few.jsonl"
        path.write_text("".join(json.dumps({"text": f"{i} and {i + 1}"}) + "\n" for i in range(LIMIT)))
        del recipe["stages"]["two"]
        told = {"make": {**TELL, **more}, "data": {"few": {"path": str(path), "val": 0}}, "seed": seed}
        recipe["stages"]["told"] = told | ({"start": start, "engine": {"device": "cpu"}} if start else {})

    return toy.graph(folder, steps=2, change=change)


def run(made, *, only="told"):
    return run_graph(made, only=only, jobs=0, drift="refuse", tell=lambda stage, said: None)


def rows(made):
    return (made.nodes["told"].artifact / "data" / "rows.jsonl").read_bytes()


def reply(question, handler):
    return f"In other words: {question['messages'][0]['content'].split()[-1]} and so on"


# -- the start's model ------------------------------------------------------------------------------------------------


OWN = {"ended": False, "tokens": 8, "rows": 8, "temperature": 1.0}


def test_a_stage_that_was_cut_while_it_asked_its_start_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    whole = graph(tmp_path / "whole", start="one", **OWN)
    run(whole)
    batches, answer = [], answers.answers

    def counted(*args, **how):
        batches.append(len(how["asked"]))
        if len(batches) == 5:
            raise KeyboardInterrupt
        return answer(*args, **how)

    monkeypatch.setattr(type(whole.modality), "answers", staticmethod(counted))
    with pytest.raises(KeyboardInterrupt):
        run(graph(tmp_path / "cut", start="one", **OWN))
    folder = tmp_path / "cut" / "runs" / "toy" / "told" / "1"
    ledger = folder / LEDGER
    assert len(ledger.read_bytes().splitlines()) == 4 * 8 and not (folder / "artifact").exists()
    os.truncate(ledger, ledger.stat().st_size - 5)  # the machine died, too
    cut = graph(tmp_path / "cut", start="one", **OWN)
    run(cut)
    assert rows(cut) == rows(whole).replace(b"/whole/", b"/cut/")
    assert batches == [8] * 5 + [8] * 4 + [4], "three batches were whole; the torn one and the rest are written again"
    assert not ledger.exists(), "what it held has become rows"


def test_chance_is_the_stage_s_and_the_batch_s_own(tmp_path):
    made = graph(tmp_path, start="one", **OWN)
    run(made)
    texts = [json.loads(line)["text"] for line in rows(made).splitlines()]
    assert len(set(texts)) > len(texts) // 2
    other = graph(tmp_path / "other", start="one", seed=5, **OWN)
    run(other)
    assert rows(other) != rows(made)


def test_a_question_has_the_form_in_which_the_tokenizer_s_model_was_taught(tmp_path):
    processor = tokenizer.bytes_tokenizer(mask=False, family=None)
    config = {"model_type": "llama"}
    plain = answers.asked(processor, "Tell:", config=config)
    assert plain[0] == models.begin_of(processor) and processor.decode(plain[1:]) == "Tell:\n"
    processor.chat_template = FALLBACK
    asked = processor.decode(answers.asked(processor, "Tell:", config=config), skip_special_tokens=True)
    assert asked == "<|user|>\nTell:<|assistant|>\n"
    processor.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="the writer's tokenizer: the chat template refuses it"):
        answers.asked(processor, "Tell:", config=config)


def test_an_answer_ends_or_is_cut_off_or_has_no_room(tmp_path):
    processor = tokenizer.bytes_tokenizer(mask=False, family=None)
    from tutelage.modalities.text.toy import MODELS

    torch.manual_seed(0)
    model = models.build(None, {**MODELS["llama"], "max_position_embeddings": 16}, processor=processor, length=16)
    asked = [answers.asked(processor, text, config=MODELS["llama"]) for text in ("a", "b" * 20)]

    def said(end, tokens=4):
        with torch.no_grad():  # the likeliest token, whatever was written before
            model.model.embed_tokens.weight.zero_()
            model.model.embed_tokens.weight[end] = 1
        return answers.answers(model, processor, asked=asked, tokens=tokens, seed=0, temperature=0)

    assert said(ord("x"))[1] == ("", False), "20 bytes and 4 more do not fit into 16"
    model.generation_config.eos_token_id = [processor.eos_token_id]
    assert not said(ord("x"))[0][1]


def test_thoughts_before_an_answer_are_no_part_of_it():
    assert spoken("<think>hm, a river</think>\n\nThe river rose. ") == "The river rose."
    assert spoken("half \ud83d a face") == "half ? a face"


# -- one behind an endpoint -------------------------------------------------------------------------------------------


def asked_at(one, **more):
    return {"endpoint": {"url": one.url, "model": "m", "timeout": 5, **more}}


def test_an_endpoint_answers_each_question_once_in_the_rows_order(tmp_path, endpoints, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", "sk-very-secret")

    def late(question, handler):  # the later asked, the sooner answered
        time.sleep(0.03 if question["messages"][0]["content"].endswith(("1", "3", "5")) else 0)
        return reply(question, handler)

    one = endpoints(late)
    made = graph(tmp_path, **asked_at(one, key_env="WRITER_KEY", parallel=4, options={"top_p": None, "min_p": 0.1}))
    run(made)
    found = [json.loads(line) for line in rows(made).splitlines()]
    assert [row["text"] for row in found] == [f"In other words: {i + 1} and so on" for i in range(LIMIT)]
    assert len(one.asked) == LIMIT and len({question["seed"] for question in one.asked}) == LIMIT
    first = next(q for q in one.asked if q["messages"][0]["content"] == "Tell:\n\n0 and 1")
    seed = first.pop("seed")
    assert first == {"model": "m", "messages": first["messages"], "max_tokens": 640, "temperature": 0.7, "min_p": 0.1}
    assert 0 <= seed < 2**31
    assert {head["authorization"] for head in one.heads} == {"Bearer sk-very-secret"}
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]
    assert written == []


def test_an_endpoint_is_asked_where_a_loop_is_running_as_in_a_notebook(tmp_path, endpoints):
    one = endpoints(reply)

    async def cell():
        return run(graph(tmp_path, **asked_at(one)))

    assert awaited(cell()).done[-1] == "told"
    assert len(one.asked) == LIMIT


def test_what_an_endpoint_answered_before_it_died_is_not_asked_again(tmp_path, endpoints):
    def dies(question, handler):
        return reply(question, handler) if len(one.asked) <= 20 else (500, b'{"error": {"message": "out of memory"}}')

    one = endpoints(dies)
    with pytest.raises(
        UserError, match=r"stages.told.make.endpoint: .*/v1: HTTP 500: out of memory \(3 tries\); 20 answers"
    ):
        run(graph(tmp_path, **asked_at(one, tries=3, parallel=2)))
    assert len(one.asked) <= 20 + 2 * 3
    other = endpoints(reply)
    again = graph(tmp_path, **asked_at(other))
    run(again)
    assert len(other.asked) == LIMIT - 20, "it has moved to another address, and goes on"
    whole = graph(tmp_path / "whole", **asked_at(endpoints(reply)))
    run(whole)
    assert rows(whole).replace(b"/whole/", b"/") == rows(again)


def test_a_wish_to_stop_that_comes_while_an_answer_is_awaited_loses_none(tmp_path, endpoints):
    def stops(question, handler):
        if len(one.asked) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return reply(question, handler)

    one = endpoints(stops)
    assert run(graph(tmp_path, **asked_at(one, parallel=1))).stopped == ["told"]
    assert 12 <= len(one.asked) <= 13
    asked = len(one.asked)
    run(graph(tmp_path, **asked_at(one, parallel=1)))
    assert len(one.asked) - asked in (LIMIT - 11, LIMIT - 12)


BAD = {
    "slow": (lambda q, h: time.sleep(1), r"no whole reply within 0.2 s \(2 tries\)"),
    "a page": (lambda q, h: (200, b"<html>"), r"the reply is no chat completion \(2 tries\)"),
    "no choices": (lambda q, h: (200, b'{"choices": []}'), r"the reply is no chat completion \(2 tries\)"),
    "a number": (lambda q, h: (200, completion(7)), r"the reply has no text \(2 tries\)"),
    "endless": (lambda q, h: (200, b"x" * (wire.MOST_BYTES + 9)), r"longer than 1,000,000 bytes \(2 tries\)"),
    "busy": (lambda q, h: (429, b"", {"retry-after": "0.01"}), r"HTTP 429 \(2 tries\)"),
    "locked": (lambda q, h: (401, b'{"error": {"message": "key sk-1\\n is wrong"}}'), "HTTP 401: key [*]{3} is wrong"),
    "elsewhere": (lambda q, h: (307, b"", {"location": "http://127.0.0.1:9/"}), "HTTP 307"),
    "unwilling": (lambda q, h: (400, b'{"detail": "no such thing as top_p"}'), "HTTP 400: no such thing as top_p"),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_an_endpoint_does_is_one_line_after_a_bounded_number_of_tries(name, tmp_path, endpoints, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", "sk-1")
    answer, line = BAD[name]
    one = endpoints(answer)
    with pytest.raises(UserError, match=line) as found:
        timeout = 0.2 if name == "slow" else 20
        run(graph(tmp_path, **asked_at(one, tries=2, timeout=timeout, parallel=2, key_env="WRITER_KEY")))
    assert "\n" not in str(found.value) and "sk-1" not in str(found.value)
    assert len(one.asked) <= (2 if name in ("locked", "elsewhere") else 12), "what does not pass is not tried again"


def test_nobody_at_the_address_is_one_line(tmp_path, endpoints):
    one = endpoints(reply)
    one.close()
    with pytest.raises(UserError, match=r"ConnectError: .* \(2 tries\); 0 answers are kept"):
        run(graph(tmp_path, **asked_at(one, tries=2)))


def test_a_fault_that_passes_is_tried_again(tmp_path, endpoints):
    one = endpoints(lambda q, h: (503, b"") if len(one.asked) % 3 == 0 else reply(q, h))
    made = graph(tmp_path, **asked_at(one, parallel=1))
    run(made)
    assert len(rows(made).splitlines()) == LIMIT


def test_a_question_that_is_refused_is_left_out_and_the_others_are_answered(tmp_path, endpoints):
    def picky(question, handler):
        text = question["messages"][0]["content"]
        if text.endswith("7"):
            return 400, b'{"error": "too long"}'
        return (
            (200, completion(None))
            if text.endswith("9")
            else (200, completion("x y", reason="length" if text.endswith("8") else "stop"))
        )

    made = graph(tmp_path, **asked_at(endpoints(picky)))
    run(made)
    counts = json.loads((made.nodes["told"].artifact / "counts.json").read_text())
    ends = [str(i + 1)[-1] for i in range(LIMIT)]
    assert counts["dropped_unanswered"] == ends.count("7") + ends.count("9") and counts[
        "dropped_cut_off"
    ] == ends.count("8")
    assert counts["kept"] == LIMIT - sum(map(ends.count, "789"))


def test_an_endpoint_that_knows_no_seed_is_asked_without_one(tmp_path, endpoints):
    one = endpoints(lambda q, h: (422, b'{"detail": "extra fields: seed"}') if "seed" in q else reply(q, h))
    made = graph(tmp_path, **asked_at(one, parallel=1))
    run(made)
    assert len(one.asked) == LIMIT + 1 and sum("seed" in question for question in one.asked) == 1


# -- which writer -----------------------------------------------------------------------------------------------------


def test_a_stage_has_one_writer(tmp_path, endpoints, monkeypatch):
    with pytest.raises(UserError, match="synth/rephrase needs a writer: `start: "):
        run(graph(tmp_path))
    with pytest.raises(UserError, match="its `start` or an `endpoint`, not both"):
        run(graph(tmp_path, start="one", endpoint={"url": "http://127.0.0.1:9/v1", "model": "m"}))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match="endpoint: give its address as `url: .*OPENAI_BASE_URL"):
        run(graph(tmp_path, endpoint={"model": "m"}))
    with pytest.raises(UserError, match="endpoint.key_env: the environment has no WRITER_KEY"):
        run(graph(tmp_path, endpoint={"url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "WRITER_KEY"}))
    one = endpoints(reply)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{one.url}/")
    run(graph(tmp_path, endpoint={"model": "m"}))
    assert len(one.asked) == LIMIT


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://[::1/v1", "http://host:99999/v1"])
def test_an_address_is_one(url):
    with pytest.raises(UserError, match=f"endpoint.url: '{url}' is not a URL".replace("[", r"\[")):
        registry.make({"use": "synth/rephrase", "endpoint": {"url": url, "model": "m"}})


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="holds no name or password") as found:
        registry.make({"use": "synth/rephrase", "endpoint": {"url": "http://me:hush@host/v1", "model": "m"}})
    assert "hush" not in str(found.value)


def test_which_model_answers_is_part_of_what_a_stage_is_and_where_it_stands_is_not(tmp_path):
    def identity(**spec):
        made = graph(tmp_path, endpoint={"url": "http://127.0.0.1:9/v1", "model": "m", **spec})
        made.fingerprint(made.nodes["told"])
        return made.nodes["told"].fingerprint

    assert identity() == identity(url="http://127.0.0.1:8/v1", timeout=9, tries=2, parallel=1, key_env="K")
    assert identity() != identity(model="n") != identity(model="n", options={"min_p": 0.1})


def test_the_plan_sizes_no_model_that_is_elsewhere(tmp_path):
    told = {
        row["stage"]: row for row in plan(graph(tmp_path, endpoint={"url": "http://127.0.0.1:9/v1", "model": "m"}))
    }["told"]
    assert told["does"] == "writes with synth/rephrase" and "params" not in told
    own = {row["stage"]: row for row in plan(graph(tmp_path, start="one"))}["told"]
    assert own["params"] > 0


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_a_ledger_gives_back_what_was_added_and_gives_up_what_was_torn(tmp_path):
    ledger = Ledger(tmp_path / LEDGER)
    found = {f"k{i}": Answer(f"text {i}\n\u2028 ünd", i % 2 == 0) for i in range(9)}
    ledger.add(list(found.items()))
    assert {key: ledger.find(key) for key in found} == found and ledger.find("k9") is None
    ledger.close(done=False)
    whole = (tmp_path / LEDGER).read_bytes()
    (tmp_path / LEDGER).write_bytes(whole.replace(b'{"key":"k3"', b'{"key" "k3"')[:-3])
    again = Ledger(tmp_path / LEDGER)
    assert {key for key in found if again.find(key)} == found.keys() - {"k3", "k8"}
    again.add([("k8", found["k8"])])
    assert again.find("k8") == found["k8"] and again.find("k0") == found["k0"]
    again.close(done=False)
    third = Ledger(tmp_path / LEDGER)
    assert third.find("k8") == found["k8"], "what was torn does not spoil what comes after it"
    third.close(done=True)
    assert not (tmp_path / LEDGER).exists()


def test_questions_that_differ_have_answers_of_their_own():
    keys = [writing.key_of([Question(*pair), 1, {"tokens": 3}]) for pair in (("a", "b"), ("a", "c"), ("b", "b"))]
    assert len({*keys, writing.key_of([Question("a", "b"), 2, {"tokens": 3}])}) == 4
