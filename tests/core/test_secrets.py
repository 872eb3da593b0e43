"""Secrets are taken out of text and configs, and other things are left in."""

import pytest

from lowrank.core.secrets import (
    REDACTED,
    environment_secrets,
    is_secret_name,
    redact,
    redact_text,
)


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "HF_TOKEN",
        "hub.token",
        "api_key",
        "api-key",
        "WANDB_API_KEY",
        "apikey",
        "aws_secret_access_key",
        "client_secret",
        "password",
        "db/passwd",
        "private_key",
        "credentials",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens", "num_tokens", "tokenizer", "key", "monkey", "keys", "max_rank"]
)
def test_names_that_only_look_alike_are_not(name):
    assert not is_secret_name(name)


def test_a_nested_config_loses_its_secrets_and_nothing_else():
    config = {
        "hub": {"token": "abc", "revision": "main", "password": None},
        "list": [{"api_key": "x"}, "plain", 3],
        "pair": (1, "two"),
        "optim": {"rate": 1e-3, "on": True},
        "secret_flag": False,
    }
    before = repr(config)
    assert redact(config) == {
        "hub": {"token": REDACTED, "revision": "main", "password": None},
        "list": [{"api_key": REDACTED}, "plain", 3],
        "pair": [1, "two"],
        "optim": {"rate": 1e-3, "on": True},
        "secret_flag": False,
    }
    assert repr(config) == before


def test_values_of_secret_environment_variables_vanish_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "not-shaped-like-a-key")
    monkeypatch.setenv("SERVICE_PASSWORD", "short")
    monkeypatch.setenv("SERVICE_URL", "harmless-and-long-enough")
    assert "not-shaped-like-a-key" in environment_secrets()
    assert (
        redact_text("https://u:not-shaped-like-a-key@host")
        == f"https://u:{REDACTED}@host"
    )
    # Short values would blank out ordinary words.
    assert redact_text("in short") == "in short"
    assert redact({"a": ["harmless-and-long-enough"]}) == {
        "a": ["harmless-and-long-enough"]
    }


@pytest.mark.parametrize(
    "secret",
    [
        "sk-" + "a1" * 12,
        "hf_" + "Ab" * 12,
        "ghp_" + "x9" * 12,
        "glpat-" + "x9" * 12,
        "xoxb-" + "12" * 12,
        "AKIA" + "A1" * 8,
        "0123456789abcdef" * 2 + "01234567",
    ],
)
def test_text_shaped_like_a_key_is_redacted(secret):
    assert redact_text(f"before {secret} after") == f"before {REDACTED} after"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("api_key=abc123", f"api_key={REDACTED}"),
        ("hub.token: abc123 rest", f"hub.token: {REDACTED} rest"),
        ("MY_PASSWORD = abc", f"MY_PASSWORD = {REDACTED}"),
        ("optim.rate=0.001", "optim.rate=0.001"),
    ],
)
def test_assigned_secrets_are_redacted(text, expected):
    assert redact_text(text) == expected


def test_fingerprints_are_not_taken_for_keys():
    text = "0123456789abcdef" * 4
    assert redact_text(text) == text
