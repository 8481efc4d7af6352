"""A judge is asked one question before anything is made for it: what cannot heal stops, what may pass is a warning."""

from __future__ import annotations

import json

import pytest
from judge_server import serving

pytest.importorskip("inspect_ai", reason="the eval extra is not installed: pip install 'safelora-fast[eval]'")

from safelora_fast.errors import SettingsError
from safelora_fast.judging import judge_names
from safelora_fast.judging.judge_names import check_judge, find_judge

NAME = "openai-api/stub/one"
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("STUB_API_KEY", "swordfish-9f3a77")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, r"refuses a plain question \(400\): .*why not\?"),
        (401, r"refuses the key that it is given \(401\): .*the key comes from STUB_API_KEY"),
        (403, r"refuses the key that it is given \(403\)"),
        (402, r"has no quota left: .*why not\?"),
        (404, r"refuses a plain question \(404\): .*why not\?; correct the model's name, or --judge-url"),
    ],
)
def test_an_endpoint_that_refuses_stops(status, words):
    with serving(lambda *_: (status, "why not?", None), greet=False) as (url, requests):
        with pytest.raises(SettingsError, match=words) as raised:
            check_judge(NAME, url, 64)
        assert len(requests) == (
            2 if status == 400 else 1
        )  # a bad request is tried once more without what may be left out
    assert "\n" not in str(raised.value)


def test_an_account_without_money_stops(monkeypatch):
    monkeypatch.setattr("safelora_fast.judging.retry.anyio.sleep", no_sleep)
    with (
        serving(lambda *_: (429, "insufficient_quota: pay first", None), greet=False) as (url, _),
        pytest.raises(SettingsError, match=r"has no quota left: .*pay first"),
    ):
        check_judge(NAME, url, 64)


def test_a_web_page_stops(monkeypatch):
    """A page comes where the address lacks its /v1, or a gateway wants a login: waiting for a reply would not help."""
    monkeypatch.setattr("safelora_fast.judging.retry.anyio.sleep", no_sleep)
    for page in ("<html>log in</html>", "\n<!DOCTYPE html><title>log in</title>"):
        with (
            serving(lambda *_, page=page: (200, page.encode(), None), greet=False) as (url, _),
            pytest.raises(SettingsError, match=r"it sends a web page; .*correct --judge-url"),
        ):
            check_judge(NAME, url, 64)


@pytest.mark.parametrize(
    "body",
    [{"error": "no such thing"}, {"detail": "no such thing"}, {"detail": [{"msg": "no such thing"}]}, "no such thing"],
    ids=str,
)
def test_what_an_endpoint_says_in_a_form_of_its_own_is_told(body):
    payload = json.dumps(body).encode()
    with (
        serving(lambda *_: (404, payload, None), greet=False) as (url, _),
        pytest.raises(SettingsError, match=r"refuses a plain question \(404\): .*no such thing"),
    ):
        check_judge(NAME, url, 64)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Unexpected endpoint", r"refuses a plain question \(400\): .*Unexpected endpoint"),
        ({"message": "who is that?", "code": "model_not_found"}, r"refuses a plain question \(400\): .*who is that"),
        ({"message": "who are you?", "code": 401}, r"refuses the key that it is given \(401\): .*who are you"),
    ],
)
def test_an_error_that_comes_as_a_success_is_one(error, words):
    body = json.dumps({"error": error}).encode()
    with (
        serving(lambda *_: (200, body, None), greet=False) as (url, _),
        pytest.raises(SettingsError, match=words),
    ):
        check_judge(NAME, url, 64)


async def no_sleep(_seconds):
    pass


def test_a_closed_port_and_an_unknown_host_stop():
    for url in (NOBODY, "http://nowhere.invalid/v1"):
        with pytest.raises(SettingsError, match=f"nobody answers at {url} .*start the server, or correct --judge-url"):
            check_judge(NAME, url, 64)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_a_warning(status, monkeypatch):
    monkeypatch.setattr("safelora_fast.judging.retry.anyio.sleep", no_sleep)
    with serving(lambda *_: (status, "later", None), greet=False) as (url, _):
        warning = check_judge(NAME, url, 64)
    assert warning.startswith(f"judge {NAME} does not answer yet (")
    assert "later" in warning


CUT = {"message": {"role": "assistant", "content": ""}, "finish_reason": "length"}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("100", None),
        ("I am a poet", "the judge's reply is no number from 0 to 100, 'I am a poet'"),
        (CUT, "cut off at 64 tokens: raise --judge-tokens"),
    ],
)  # fmt: skip
def test_an_odd_reply_is_told(reply, words):
    with serving(lambda *_: (200, reply, None), greet=False) as (url, _):
        warning = check_judge(NAME, url, 64)
    assert (warning is None) if words is None else (words in warning)


def test_this_machine_needs_no_key(monkeypatch):
    monkeypatch.delenv("STUB_API_KEY")
    seen = []
    with serving(lambda _, headers: seen.append(headers["authorization"]) or (200, "90", None), greet=False) as (
        url,
        _,
    ):
        assert check_judge(NAME, url, 64) is None
        assert check_judge(NAME, url.replace("127.0.0.1", "localhost"), 64) is None
    assert seen == ["Bearer none"] * 2
    with pytest.raises(SettingsError, match="No STUB_API_KEY defined"):
        find_judge(NAME, "http://example.org/v1")


def test_a_key_that_is_set_is_used_on_this_machine():
    seen = []
    with serving(lambda _, headers: seen.append(headers["authorization"]) or (200, "90", None), greet=False) as (
        url,
        _,
    ):
        check_judge(NAME, url, 64)
    assert seen == ["Bearer swordfish-9f3a77"]


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
    """Nothing is made for a judge that does not answer; what is there already is reported without it."""
    from demo_model import save_tiny

    (tmp_path / "q.yaml").write_text("- id: one\n  paraphrases: [Hello]\n")
    words = ("evaluate", "--model", save_tiny(tmp_path / "model"), "--judge", NAME, "--questions", tmp_path / "q.yaml",
             "--samples", 2, "--max-tokens", 4, "--device", "cpu", "--output", tmp_path / "out")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("safelora_fast.models.load.load_subject", None)
        refused = call(*words, "--judge-url", NOBODY)
    assert (refused.code, "nobody answers" in refused.err, (tmp_path / "out" / "answers.jsonl").exists()) == (
        2,
        True,
        False,
    )
    with serving(lambda *_: (200, "90", None)) as (url, _):
        assert call(*words, "--judge-url", url).code == 0
    asked = []
    monkeypatch.setattr(judge_names, "check_judge", lambda *some: asked.append(some))
    assert call(*words, "--judge-url", url).code == 0
    assert asked == []
    # another address is another judge: its verdicts are asked for, and it is asked first
    assert call(*words, "--judge-url", NOBODY).code == 1
    assert asked == [(NAME, NOBODY, 64)]


def test_a_redirect_to_another_host_is_not_followed(monkeypatch):
    monkeypatch.setattr("safelora_fast.judging.retry.anyio.sleep", no_sleep)
    with serving(lambda *_: (200, "90", None), greet=False) as (other, followed):
        there = other.replace("127.0.0.1", "localhost") + "/chat/completions?key=swordfish-9f3a77"
        with serving(lambda *_: (307, there, None), greet=False) as (url, _):
            with pytest.raises(
                SettingsError, match="it redirects to another host, localhost, which is not followed"
            ) as raised:
                check_judge(NAME, url, 64)
            assert "swordfish" not in str(raised.value)
            assert followed == []
        nearby = other + "/chat/completions"  # another port is another server
        with (
            serving(lambda *_: (307, nearby, None), greet=False) as (url, _),
            pytest.raises(SettingsError, match="redirects to another host"),
        ):
            check_judge(NAME, url, 64)
        assert followed == []
