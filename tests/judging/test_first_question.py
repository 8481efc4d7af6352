"""The first question to a judge: a permanent problem is an error, a problem that may be temporary is a warning."""

from __future__ import annotations

import json

import pytest
from judge_server import never_wait, serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.errors import SettingsError
from safelora_fast.judging import judge_names
from safelora_fast.judging.judge_names import check_judge, find_judge
from safelora_fast.judging.retry import Endpoint

NAME = "openai-api/stub/one"
NOBODY = "http://127.0.0.1:9/v1"
SECRET = "swordfish-9f3a77"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    never_wait(monkeypatch)
    monkeypatch.setattr(Endpoint, "_wait", lambda *_: 0.0)
    monkeypatch.setenv("STUB_API_KEY", SECRET)


def of_body(body, status=200):
    return status, json.dumps(body).encode(), None


def error_of(error):
    """An error with a success status."""
    return of_body({"error": error})


CUT = {"message": {"role": "assistant", "content": ""}, "finish_reason": "length"}
HOPELESS = [
    ((400, "why not?", None), r"refuses a plain question \(400\): .*why not\?"),
    ((401, "why not?", None), r"refuses the key that it is given \(401\): .*the key comes from STUB_API_KEY"),
    ((403, "why not?", None), r"refuses the key that it is given \(403\)"),
    ((402, "why not?", None), r"has no quota left: .*why not\?"),
    ((404, "why?", None), r"refuses a plain question \(404\): .*why\?; correct the model's name, or --judge-url"),
    ((429, "insufficient_quota: pay first", None), r"has no quota left: .*pay first"),
    # a web page comes if the address lacks /v1, or if a gateway requires a login
    ((200, b"<html>log in</html>", None), r"v1 is not the address of .*it sends a web page; .*correct --judge-url"),
    *(
        ((status, page + b"<title> Log\nin </title>", None), r"is not the address of .*it sends a web page “Log in”; .*correct")
        for status, page in ((200, b"\xef\xbb\xbf<!-- a comment -->"), (404, b"\n<!DOCTYPE html>"), (405, b"<?xml?>"))
    ),
    (
        (401, b"<html><title>Log in</title><body>secret</html>", None),
        r"refuses the key that it is given \(401\): status 401, with a web page “Log in”; the key",
    ),
    *(
        (of_body(body, 404), r"refuses a plain question \(404\): .*no such thing")
        for body in (
            {"error": "no such thing"}, {"detail": "no such thing"}, {"detail": [{"msg": "no such thing"}]}, "no such thing"
        )
    ),
    (error_of("Unexpected endpoint"), r"refuses a plain question \(400\): .*Unexpected endpoint"),
    (error_of({"message": "who is that?", "code": "not_found"}), r"refuses a plain question \(400\): .*who is that"),
    (error_of({"message": "who are you?", "code": 401}), r"refuses the key that it is given \(401\): .*who are you"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "words"), HOPELESS)
def test_an_endpoint_that_will_not_answer_is_an_error(reply, words):
    with serving(lambda *_: reply, greet=False) as (url, requests):
        with pytest.raises(SettingsError, match=words) as raised:
            check_judge(NAME, url, 64)
        if reply[0] in {400, 401}:  # a bad request is sent again without optional parameters
            assert len(requests) == (2 if reply[0] == 400 else 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", [NOBODY, "http://nowhere.invalid/v1"])
def test_a_closed_port_and_an_unknown_host_are_errors(url):
    with pytest.raises(SettingsError, match=f"nobody answers at {url} .*start the server, or correct --judge-url"):
        check_judge(NAME, url, 64)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        *(((status, "later", None), f"judge {NAME} does not answer yet (") for status in (429, 500, 503)),
        (
            (502, b"<html><head><title>Bad Gateway</title><body><center>nginx", None),
            "InternalServerError: status 502, with a web page “Bad Gateway”)",
        ),
        ((200, "100", None), None),
        ((200, "I am a poet", None), "the judge's reply is no number from 0 to 100, 'I am a poet'"),
        ((200, CUT, None), "cut off at 64 tokens: raise --judge-tokens"),
    ],
)
def test_what_may_pass_is_a_warning(reply, words):
    with serving(lambda *_: reply, greet=False) as (url, _):
        warning = check_judge(NAME, url, 64)
    assert (warning is None) if words is None else (words in warning)
    assert "later" not in reply or "later" in warning


@pytest.mark.parametrize("is_set", [False, True])
def test_a_key_is_used_if_it_is_set_and_this_machine_needs_none(is_set, monkeypatch):
    if not is_set:
        monkeypatch.delenv("STUB_API_KEY")
    seen = []
    reply = lambda _, headers: seen.append(headers["authorization"]) or (200, "90", None)  # noqa: E731
    with serving(reply, greet=False) as (url, _):
        for one in (url, url.replace("127.0.0.1", "localhost")):
            assert check_judge(NAME, one, 64) is None
    assert seen == [f"Bearer {SECRET if is_set else 'none'}"] * 2
    if not is_set:
        with pytest.raises(SettingsError, match="No STUB_API_KEY defined"):
            find_judge(NAME, "http://example.org/v1")


ODD = [
    "http://user:pa[ss-word9@host/v1", "http://user:pa/ss-word9@host/v1", "http://user:pa?ss-word9@host/v1", "http://host:ss-word9/v1",
    "http://[ss-word9/v1", "host:8000/v1?ss-word9", "ftp://ss-word9/v1", "http://host/v1?api_key=ss-word9", "http://ss-word9 /v1",
]  # fmt: skip


@pytest.mark.parametrize("url", ODD)
@pytest.mark.parametrize("by_environment", [False, True])
def test_an_odd_url_is_one_line_that_does_not_show_it(url, by_environment, monkeypatch):
    monkeypatch.setenv("STUB_BASE_URL", url)
    with pytest.raises(SettingsError) as raised:
        find_judge(NAME, None if by_environment else url)
    assert "word9" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert "\n" not in str(raised.value)


def test_the_judge_is_asked_before_the_model_is_loaded(call, tmp_path, monkeypatch):
    """An unreachable judge stops the command before any work; stored verdicts are reported without the judge."""
    from demo_model import save_tiny

    (tmp_path / "q.yaml").write_text("- id: one\n  paraphrases: [Hello]\n")
    words = ("evaluate", "--model", save_tiny(tmp_path / "model"), "--judge", NAME, "--questions", tmp_path / "q.yaml",
             "--samples", 2, "--max-tokens", 4, "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("safelora_fast.models.load.load_subject", None)
        refused = call(*words, "--judge-url", NOBODY)
    assert (refused.code, "nobody answers" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    with serving(lambda *_: (200, "90", None)) as (url, _):
        assert call(*words, "--judge-url", url).code == 0
    asked = []
    monkeypatch.setattr(judge_names, "check_judge", lambda *some: asked.append(some))
    assert call(*words, "--judge-url", url).code == 0
    assert asked == []
    # another address is another judge, which gets the first question too
    assert call(*words, "--judge-url", NOBODY).code == 1
    assert asked == [(NAME, NOBODY, 64)]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_redirect_to_another_host_or_port_is_not_followed(host):
    with serving(lambda *_: (200, "90", None), greet=False) as (other, followed):
        there = other.replace("127.0.0.1", host) + f"/chat/completions?key={SECRET}"
        with (
            serving(lambda *_: (307, there, None), greet=False) as (url, _),
            pytest.raises(
                SettingsError, match=f"it redirects to another host, {host}, which is not followed"
            ) as raised,
        ):
            check_judge(NAME, url, 64)
    assert "swordfish" not in str(raised.value)
    assert followed == []
