"""Secrets in a text (keys, tokens, passwords in addresses) by the patterns of detect-secrets, and of providers that it lacks.

Nothing is verified over a network. The patterns are matched in place, since a secret must be masked with both of its ends: some
of the detectors give only a part of what they find ("ghp" of a GitHub token, the first line of a private key).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from filters.personal import Finding, missing, pieces

# The detectors of detect-secrets whose patterns are a provider's own form. Left out: "keyword" and the guesses by the name of a
# variable, which cry wolf in prose; public IP addresses, which are personal data; and basic auth and private keys, which have
# patterns in data/tokens.yaml that take linear time and cover the whole key.
DETECTORS = {
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector",
    "npm": "NpmDetector",
    "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
# What must stand in a text before a detector reads it whose pattern would take time in the square of the text's length.
_FIRST = {"npm": "_authToken", "openai": "T3BlbkFJ", "jwt": "eyJ"}
KIND = {
    "npm": "NPM_TOKEN",
    "openai": "OPENAI_KEY",
    "aws": "AWS_KEY",
    "stripe": "STRIPE_KEY",
    "twilio": "TWILIO_KEY",
    "mailchimp": "MAILCHIMP_KEY",
}

GATE = r"://\S+@|PRIVATE KEY"
LONG = r"[\w-]{20}"  # every token is a long word, and has a digit
_QUOTED = r"[\"'][0-9A-Za-z+/=_-]{20}"
_REST = re.compile(r"[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]{8,})*")  # what goes on where a pattern has had enough: a signature, a longer key
_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_BODY = re.compile(r"[A-Za-z0-9+/=:,\s-]*")  # of a key whose end is missing
ENTROPY_BASE64, ENTROPY_HEX = 4.5, 3.0  # bits a character: the limits of detect-secrets
SURE, UNSURE = 1.0, 0.5


def gate(text: pl.Expr, *, entropy: bool = False) -> pl.Expr:
    """Whether a secret may stand in a text."""
    long = text.str.contains(LONG) & text.str.contains(r"\d")
    return text.str.contains(f"{GATE}|{_QUOTED}" if entropy else GATE) | long


def find(text: str, *, entropy: bool = False) -> list[Finding]:
    """The secrets in a text, in the order of places. `entropy`: quoted strings that look random count as well, surely or not."""
    found = set(_keys(text))
    for at, piece in pieces(text):
        found |= {Finding(at + start, at + end, kind, score) for start, end, kind, score in _tokens(piece, entropy)}
    return sorted(found)


def _keys(text: str) -> Iterator[Finding]:
    """Private keys from their first line to their last, or as far as the key goes on."""
    at = 0
    while begin := _KEY.search(text, at):
        last, following = _KEY_END.search(text, begin.end()), _KEY.search(text, begin.end())
        if last and not (following and following.start() < last.start()):
            at = last.end()
        else:
            body = _KEY_BODY.match(text, begin.end(), following.start() if following else len(text))
            at = body.end() if body else begin.end()
        yield Finding(begin.start(), at, "PRIVATE_KEY", SURE)


def _tokens(text: str, entropy: bool) -> Iterator[Finding]:
    for name, detector in _detectors().items():
        if name in _FIRST and _FIRST[name] not in text:
            continue
        valid = detector.is_formally_valid if name == "jwt" else bool
        for pattern in detector.denylist:
            for match in pattern.finditer(text):
                if valid(match[0]):
                    yield _whole(text, match, KIND.get(name) or (name if name.endswith("token") else f"{name}_token").upper())
    for kind, pattern in _patterns().items():
        for match in pattern.finditer(text):
            yield _whole(text, match, kind)
    if entropy:
        yield from _random(text)


def _whole(text: str, match: re.Match[str], kind: str) -> Finding:
    """The match, and what of the token goes on behind it."""
    if kind == "BASIC_AUTH":
        return Finding(match.start(1), match.end(1), kind, SURE)
    rest = _REST.match(text, match.end())
    return Finding(match.start(), rest.end() if rest else match.end(), kind, SURE)


def _random(text: str) -> Iterator[Finding]:
    for detector, limit in ((_entropy("Base64HighEntropyString"), ENTROPY_BASE64), (_entropy("HexHighEntropyString"), ENTROPY_HEX)):
        for match in detector.regex.finditer(text):
            if detector.calculate_shannon_entropy(match[2]) > limit:
                yield Finding(match.start(2), match.end(2), "HIGH_ENTROPY_STRING", UNSURE)


@cache
def _detectors() -> dict[str, Any]:
    from importlib import import_module

    try:
        return {name: getattr(import_module(f"detect_secrets.plugins.{name}"), kind)() for name, kind in DETECTORS.items()}
    except ImportError as error:
        raise missing() from error


@cache
def _entropy(name: str) -> Any:
    from importlib import import_module

    return getattr(import_module("detect_secrets.plugins.high_entropy_strings"), name)()


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    path = Path(__file__).parent / "data" / "tokens.yaml"
    return {kind: re.compile(pattern) for kind, pattern in yaml.safe_load(path.read_text(encoding="utf-8")).items()}
