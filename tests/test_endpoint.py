"""The endpoint MLLM through the official client, against a real HTTP server."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from endpoint_server import Manners, TestServer, running
from mllm_dialogues import ask_box
from random_models import build, picture
from tokenizers.processors import TemplateProcessing

from sam4mllm_tool.concurrency import CallCancelled, CallContext, call_context
from sam4mllm_tool.errors import DialogueError, EndpointError, ProbabilitiesMissing, ThoughtCutOff
from sam4mllm_tool.formats import get_format
from sam4mllm_tool.grammar import Choice, Literal, Number, Repeat, grammar_regex
from sam4mllm_tool.mllm.endpoint import OpenAIEndpointMllm
from sam4mllm_tool.mllm.local import LocalMllm
from sam4mllm_tool.protocols import Question, Turn, YesNoWords
from sam4mllm_tool.types import TargetCount

WORDS = YesNoWords(("Yes",), ("No",))
FORMAT = get_format("sam4mllm")


@pytest.fixture(scope="module")
def serving(embedded_model):
    server = TestServer(embedded_model.mllm)
    settings = embedded_model.settings
    for count in TargetCount:
        for grammar in (
            FORMAT.box_grammar(count),
            FORMAT.box_and_points_grammar(count, settings.positive, settings.negative),
        ):
            server.grammars[grammar_regex(grammar)] = grammar
    with running(server) as url:
        yield server, url


@pytest.fixture
def server(serving):
    serving[0].manners = Manners()
    return serving[0]


@pytest.fixture
def endpoint(server, serving):
    # All tokens' probabilities, so that nothing hangs on how well the shipped model is trained.
    mllm = OpenAIEndpointMllm(serving[1], format_name="sam4mllm", retries=2, top_logprobs=10_000)
    yield mllm
    mllm.close()


@pytest.fixture
def asked(demo_image):
    """The demo picture, and a dialogue up to round 2 about a grid of points."""
    image, expression = demo_image
    box = FORMAT.read_boxes("[200,200,700,700]", image.size).boxes[0]
    from sam4mllm_tool.pipeline.points import grid_points

    points = grid_points(box, 9)
    first = Turn("user", FORMAT.ask_boxes(expression, TargetCount.ONE, image.size))
    reply = Turn("assistant", FORMAT.write_boxes([box], image.size))
    second = Turn("user", FORMAT.ask_points(expression, box, points, image.size))
    return image, (first,), (first, reply, second)


def close(one, other):
    return all(a == pytest.approx(b, abs=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("strategy", ["pqpp", "ppg"])
def test_the_pipeline_gives_the_same_masks_as_with_the_local_engine(
    embedded_model, endpoint, demo_image, strategy
):
    image, expression = demo_image
    local = replace(embedded_model, settings=replace(embedded_model.settings, strategy=strategy))
    remote = replace(local, mllm=endpoint)
    for text in (expression, "the biggest circle"):
        ours, theirs = (model.segment(image, text) for model in (local, remote))
        assert [o.located.box for o in ours.objects] == [o.located.box for o in theirs.objects]
        assert [o.mask for o in ours.objects] == [o.mask for o in theirs.objects]
        for one, other in zip(ours.objects, theirs.objects, strict=True):
            for p, q in zip(one.points, other.points, strict=True):
                assert (p.x, p.y, p.label) == (q.x, q.y, q.label)
                if p.p_yes is not None:
                    assert close((p.p_yes, p.p_no), (q.p_yes, q.p_no))


def test_a_reply_keeps_to_its_grammar_and_is_scored_alike(embedded_model, endpoint, asked):
    image, opening, _ = asked
    for count in TargetCount:
        grammar = FORMAT.box_grammar(count)
        ours = embedded_model.mllm.generate(image, opening, grammar=grammar)
        theirs = endpoint.generate(image, opening, grammar=grammar)
        assert theirs.text == ours.text
        assert theirs.log_probability == pytest.approx(ours.log_probability, abs=1e-3)


@pytest.mark.parametrize("kind", ["vllm", "vllm-0.12"])
def test_answers_are_those_of_the_local_engine(embedded_model, serving, server, asked, kind):
    image, opening, dialogue = asked
    mllm = OpenAIEndpointMllm(serving[1], server=kind, top_logprobs=10_000)
    for turns in (dialogue, opening):  # the second asks for no yes or no at all
        ours = embedded_model.mllm.answer_yes_no(image, turns, words=WORDS, count=9)
        theirs = mllm.answer_yes_no(image, turns, words=WORDS, count=9)
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["vllm-0.12", "sglang"])
def test_a_model_that_keeps_to_yes_and_no_is_asked_once(server, serving, asked, kind):
    image, _, dialogue = asked
    mllm = OpenAIEndpointMllm(serving[1], "tiny", server=kind, top_logprobs=10_000)
    server.manners.likely = ("Yes", "No") * 4
    answers = mllm.answer_yes_no(image, dialogue, words=WORDS, count=8)
    assert [answer.p_yes > answer.p_no for answer in answers] == [True, False] * 4
    assert len(server.manners.requests) == 1
    server.manners.likely = ("Yes", "No", ":", "No", "Yes")
    server.manners.requests.clear()
    assert len(mllm.answer_yes_no(image, dialogue, words=WORDS, count=4)) == 4
    second = server.manners.requests[1]
    assert second["messages"][-1]["content"] in ("YesNoYes", "YesNoNo")
    assert second["continue_final_message"] is True


# --- vLLM: all answers in one request -------------------------------------------------------------


def test_vllm_is_asked_once_for_all_answers(embedded_model, endpoint, server, asked):
    """Also where the model would rather say something else at every slot."""
    image, opening, dialogue = asked
    endpoint.answer_yes_no(image, dialogue, words=WORDS, count=1)  # the examination is over
    for turns in (dialogue, opening):
        server.manners.requests.clear()
        ours = embedded_model.mllm.answer_yes_no(image, turns, words=WORDS, count=30)
        theirs = endpoint.answer_yes_no(image, turns, words=WORDS, count=30)
        assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
        assert len(server.manners.requests) == 1
    assert sum(ours[0]) < 0.9, "probabilities among yes and no alone would prove nothing"
    tokens = embedded_model.mllm._yes_no_tokens(WORDS)
    request = server.manners.requests[0]
    for name in ("allowed_token_ids", "logprob_token_ids"):
        assert sorted(request[name]) == sorted((*tokens.yes, *tokens.no))
    assert request["max_tokens"] == request["min_tokens"] == 30
    assert "top_logprobs" not in request


def test_the_server_is_examined_once(endpoint, server, asked):
    image, _, dialogue = asked
    endpoint.answer_yes_no(image, dialogue, words=WORDS, count=2)
    examined = len(server.manners.tokenized), len(server.manners.requests)
    for _ in range(3):
        endpoint.answer_yes_no(image, dialogue, words=WORDS, count=2)
    assert (len(server.manners.tokenized), len(server.manners.requests) - 3) == examined


@pytest.mark.parametrize(
    ("manners", "error", "message", "hint"),
    [
        ({"logprobs": False}, ProbabilitiesMissing, "no token probabilities", "'logprobs'"),
        ({"ignored": {"logprob_token_ids"}}, ProbabilitiesMissing, "no probability for token",
         "'logprob_token_ids'"),
        ({"ignored": {"allowed_token_ids"}}, EndpointError, "neither yes nor no",
         "'allowed_token_ids'"),
        ({"ignored": {"return_tokens_as_token_ids"}}, EndpointError, "by its text",
         "'return_tokens_as_token_ids'"),
        ({"longest": 1}, EndpointError, "1 of 2 questions", "'min_tokens'"),
        ({"other_ids": True}, ProbabilitiesMissing, "no probability for", "logprob_token_ids"),
        ({"processed": True}, ProbabilitiesMissing, "whole vocabulary", "--logprobs-mode"),
        ({"value": math.nan}, EndpointError, "nan for yes", "damaged"),
        ({"value": 0.5}, EndpointError, "not probabilities", "damaged"),
        ({"value": math.inf}, EndpointError, "not probabilities", "damaged"),
        ({"tokenizes": False}, EndpointError, "does not answer /tokenize", "/tokenize"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_is_named_in_one_sentence(
    endpoint, server, asked, manners, error, message, hint
):
    for name, value in manners.items():
        setattr(server.manners, name, value)
    for _ in range(2):  # a failed examination is no passed one
        with pytest.raises(error, match=message) as caught:
            endpoint.answer_yes_no(asked[0], asked[2], words=WORDS, count=3)
        assert hint in caught.value.hint and not caught.value.retryable


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_no_probabilities_are_no_answers_of_any_server(server, serving, asked, value):
    mllm = OpenAIEndpointMllm(serving[1], server="vllm-0.12", top_logprobs=10_000)
    server.manners.value = value
    with pytest.raises(EndpointError, match="not probabilities"):
        mllm.answer_yes_no(asked[0], asked[2], words=WORDS, count=3)


def test_a_template_with_something_before_past_replies_is_named(endpoint, server, asked):
    """As where a published template writes a newline before every text."""
    processor = server.mllm.encoder.processor
    own = processor.chat_template
    processor.chat_template = own.replace("'<|assistant|>\\n'", "'<|assistant|>\\n\\n'", 1)
    assert processor.chat_template != own
    try:
        with pytest.raises(EndpointError, match="earlier reply elsewhere") as caught:
            endpoint.answer_yes_no(asked[0], asked[2], words=WORDS, count=3)
        assert "--chat-template" in caught.value.hint
    finally:
        processor.chat_template = own


def test_the_start_token_is_put_where_the_template_leaves_it_out(tmp_path):
    """LLaVA-1.5's template writes none: its processor does, and vLLM does not unless asked to."""
    loaded = LocalMllm.from_pretrained(build("llava", tmp_path), device="cpu")
    processor = loaded.encoder.processor
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)]
    )
    mllm = LocalMllm(loaded.model, processor, name="llava")
    image = picture(0)
    opening = ask_box("abc", image)
    grammar = FORMAT.box_grammar(TargetCount.ONE)
    server = TestServer(mllm)
    server.grammars[grammar_regex(grammar)] = grammar
    with running(server) as url:
        remote = OpenAIEndpointMllm(url, format_name="generic")
        there = remote.answer_yes_no(image, opening, words=WORDS, count=4)
        here = mllm.answer_yes_no(image, opening, words=WORDS, count=4)
        assert all(close(a, b) for a, b in zip(here, there, strict=True))
        said = remote.generate(image, opening, grammar=grammar)
        assert said.text == mllm.generate(image, opening, grammar=grammar).text
        assert all(request["add_special_tokens"] for request in server.manners.requests)


def test_the_start_token_is_not_written_twice(endpoint, server, asked):
    endpoint.answer_yes_no(asked[0], asked[2], words=WORDS, count=2)
    assert not any(request.get("add_special_tokens") for request in server.manners.requests)


# --- thinking models ------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_thought_is_no_part_of_the_answer(server, serving, asked, apart):
    """Without and with --reasoning-parser; the thought holds a box that is not the answer."""
    mllm = OpenAIEndpointMllm(serving[1])
    server.manners.thought = "[001,002,003,004]</think>\n[100,200,300,400]"
    server.manners.apart = apart
    said = mllm.generate(asked[0], asked[1], max_new_tokens=40).text
    assert said.startswith("[100,200,300,400]") and "001,002" not in said


@pytest.mark.parametrize("apart", [False, True])
def test_a_thought_that_was_cut_off_is_no_answer(server, serving, asked, apart):
    mllm = OpenAIEndpointMllm(serving[1])
    server.manners.thought = "<think>[001,002,003,004] or no object found"
    server.manners.apart = apart
    with pytest.raises(ThoughtCutOff) as caught:
        mllm.generate(asked[0], asked[1], max_new_tokens=20)
    assert "thought_budget" in caught.value.hint and caught.value.raw_reply


def test_a_server_without_probabilities_is_refused_loudly(endpoint, server, asked):
    image, opening, dialogue = asked
    server.manners.logprobs = False
    with pytest.raises(ProbabilitiesMissing) as error:
        endpoint.answer_yes_no(image, dialogue, words=WORDS, count=3)
    assert "vLLM" in error.value.hint
    reply = endpoint.generate(image, opening, grammar=FORMAT.box_grammar(TargetCount.ONE))
    assert reply.log_probability is None, "a box can do without"


def test_a_plain_server_gets_no_strange_fields_and_cannot_be_continued(server, serving, asked):
    image, opening, _ = asked
    server.manners.owner = "somebody"
    mllm = OpenAIEndpointMllm(serving[1], format_name="sam4mllm")
    assert mllm.server == "plain"
    mllm.generate(image, opening, grammar=FORMAT.box_grammar(TargetCount.ONE), max_new_tokens=20)
    known = {"model", "messages", "max_tokens", "logprobs", "temperature", "top_logprobs"}
    assert set(server.manners.requests[-1]) <= known
    with pytest.raises(EndpointError, match="continue a reply") as error:
        mllm.answer_yes_no(image, opening, words=WORDS, count=4)
    assert not error.value.retryable


@pytest.mark.parametrize(
    ("kind", "field"),
    [("vllm", "structured_outputs"), ("vllm-guided", "guided_regex"), ("sglang", "regex")],
)
def test_each_kind_of_server_gets_the_grammar_in_its_own_field(server, serving, asked, kind, field):
    mllm = OpenAIEndpointMllm(serving[1], "tiny", format_name="sam4mllm", server=kind)
    grammar = (Repeat((Choice(tuple((Literal(chr(c)),) for c in range(10, 127))),), 0, 999),)
    mllm.generate(asked[0], asked[1], grammar=grammar, max_new_tokens=2)
    sent = server.manners.requests[-1][field]
    assert (sent["regex"] if kind == "vllm" else sent) == grammar_regex(grammar)


def test_a_reply_outside_the_grammar_is_a_dialogue_error(endpoint, server, asked):
    server.manners.keep_to_regex = False
    with pytest.raises(DialogueError) as error:
        endpoint.generate(asked[0], asked[1], grammar=(Literal("[["), Number(3)), max_new_tokens=3)
    assert error.value.raw_reply


def test_alternates_differ_and_start_with_the_greedy_reply(endpoint, asked):
    image, opening, _ = asked
    grammar = FORMAT.box_grammar(TargetCount.ONE)
    replies = endpoint.alternates(image, opening, grammar=grammar, count=3)
    assert replies[0].text == endpoint.generate(image, opening, grammar=grammar).text
    assert len({reply.text for reply in replies}) == len(replies) <= 3
    assert endpoint.alternates(image, opening, grammar=grammar, count=3) == replies
    scores = [reply.log_probability for reply in replies[1:]]
    assert scores == sorted(scores, reverse=True)
    assert all(re.fullmatch(grammar_regex(grammar), reply.text) for reply in replies)


# --- faults ---------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again(endpoint, server, asked):
    server.manners.failures = 2
    assert endpoint.generate(asked[0], asked[1], max_new_tokens=2)
    assert len(server.manners.requests) == 3
    server.manners.failures = 9
    with pytest.raises(EndpointError, match="503") as error:
        endpoint.generate(asked[0], asked[1], max_new_tokens=2)
    assert error.value.retryable


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_asked_again(endpoint, server, asked, status):
    server.manners.status = status
    with pytest.raises(EndpointError, match=str(status)) as error:
        endpoint.generate(asked[0], asked[1])
    assert not error.value.retryable
    assert len(server.manners.requests) == 1


def test_a_slow_server_times_out(server, serving, asked):
    mllm = OpenAIEndpointMllm(serving[1], timeout=0.2, retries=0)
    server.manners.delay = 1.0
    with pytest.raises(EndpointError, match="in time") as error:
        mllm.generate(asked[0], asked[1])
    assert error.value.retryable


def test_an_absent_server_or_model_is_named(serving):
    with pytest.raises(EndpointError, match="cannot be reached"):
        OpenAIEndpointMllm("http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(EndpointError, match="does not serve 'gpt'") as error:
        OpenAIEndpointMllm(serving[1], "gpt")
    assert "tiny" in error.value.hint


def test_many_threads_ask_at_a_time(embedded_model, endpoint, server, asked):
    image, _, dialogue = asked
    server.manners.delay = 0.2
    expected = embedded_model.mllm.answer_yes_no(image, dialogue, words=WORDS, count=1)
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(endpoint.answer_yes_no, image, dialogue, words=WORDS, count=1)
            for _ in range(10)
        ]
    for job in jobs:
        assert all(close(a, b) for a, b in zip(expected, job.result(), strict=True))
    assert server.manners.most_active > 4


def test_many_questions_of_one_call_are_asked_side_by_side(embedded_model, endpoint, server, asked):
    """The first one alone, so that the others find the picture in the server's prefix cache."""
    image, opening, dialogue = asked
    questions = [Question(image, dialogue, n) for n in (3, 1, 2, 1, 3, 2)]
    questions += [Question(image, opening, 0)]
    expected = embedded_model.mllm.answer_each(questions, words=WORDS)
    endpoint.answer_yes_no(image, dialogue, words=WORDS, count=1)  # the examination of the server
    server.manners.delay, server.manners.most_active = 0.2, 0
    asked_before = len(server.manners.requests)
    said = endpoint.answer_each(questions, words=WORDS)
    assert [len(some) for some in said] == [3, 1, 2, 1, 3, 2, 0]
    for some, others in zip(said, expected, strict=True):
        assert all(close(a, b) for a, b in zip(some, others, strict=True))
    assert len(server.manners.requests) - asked_before == 6
    assert server.manners.most_active > 2
    assert endpoint.answer_each([], words=WORDS) == []


def test_the_first_of_many_questions_is_asked_alone(endpoint, server, asked):
    image, _, dialogue = asked
    endpoint.answer_yes_no(image, dialogue, words=WORDS, count=1)
    server.manners.delay, server.manners.most_active = 0.2, 0
    endpoint.answer_each([Question(image, dialogue, 1)] * 2, words=WORDS)
    assert server.manners.most_active == 1


def test_a_cancelled_call_sends_nothing(endpoint, server, asked):
    context = CallContext()
    context.cancelled.set()
    with call_context(context), pytest.raises(CallCancelled):
        endpoint.generate(asked[0], asked[1])
    assert not server.manners.requests


# --- grammar as regular expression ----------------------------------------------------------------


def test_regexes_match_exactly_the_grammars_replies():
    grammar = (
        Literal("\n(a.b*"),
        Number(2),
        Choice((((Literal("|")), Number(1)), ())),
        Repeat((Literal("]"),), 1, 2),
    )
    pattern = grammar_regex(grammar)
    for good in ("\n(a.b*07|3]", "\n(a.b*07]]"):
        assert re.fullmatch(pattern, good)
    for bad in ("\n(a.b*7]", "\n(aXb*07]", "(a.b*07]", "\n(a.b*07|]", "\n(a.b*07]]]", "\n(a.b*07"):
        assert not re.fullmatch(pattern, bad)


def test_the_formats_replies_match_their_own_regex():
    pattern = grammar_regex(FORMAT.box_grammar(TargetCount.ZERO_OR_MORE))
    for boxes in ([], [(0, 0, 10, 10)], [(0, 0, 10, 10)] * 3):
        from sam4mllm_tool.types import Box

        reply = FORMAT.write_boxes([Box(*box) for box in boxes], (20, 20))
        assert re.fullmatch(pattern, reply)


def test_a_server_is_loaded_by_its_address(embedded_model, server, serving, blocks_file):
    from typer.testing import CliRunner

    from sam4mllm_tool.cli import app
    from sam4mllm_tool.pipeline.model import load

    model = load(serving[1], format="sam4mllm", top_logprobs=10_000)
    assert model.mllm.name == f"tiny at {serving[1]}" and model.speech.name == "sam4mllm"
    with pytest.raises(EndpointError, match="does not serve 'my-lora'"):
        load(serving[1], adapter="my-lora")
    arguments = ["segment", str(blocks_file), "the red square", "--strategy", "box_only"]
    told = [
        CliRunner().invoke(app, [*arguments, "--json", *more], catch_exceptions=False).output
        for more in ([], ["--mllm", serving[1], "--format", "sam4mllm"])
    ]
    here, there = (json.loads(text)["objects"] for text in told)
    assert [one["mask"] for one in here] == [one["mask"] for one in there]
