"""Text without the secrets that addresses hold: one function, for everything that is logged, shown or published.

Cameras are told who we are in many ways, and makers agree on none of them:

    rtsp://user:password@host/...                      what a URL has for it; passwords are often not percent-encoded
    ...?user=admin&password=x, usr= and pwd=           Dahua, Amcrest, Reolink, Foscam, ACTi, D-Link and many others
    .../user=admin_password=x_channel=1_stream=0.sdp   Xiongmai and those who build on it
    ...?loginuse=admin&loginpas=x, ?u=admin&p=x        VStarcam; some recorders
    ...?auth=BASE64, ?token=x, ?X-Amz-Signature=x      Hikvision; relays and clouds
    .../0/admin:x/main                                 recorders sold under many names
    rtsps://host:7441/KEY?enableSrtp                   UniFi Protect, where the path is the secret
    https://hooks.example/services/KEY, .../webhook/KEY   chat rooms and automations that a line reports to
    https://relay.example/live/9f3b81c0-77d2-...       relays and clouds: a long segment of letters and digits mixed
    user-id= and user-pw=, proxy-pw=, passphrase=      GStreamer's elements
    extra-headers="...,Authorization=Basic x"          the same

In doubt more is masked than is secret: an address that lost a word too many can still be told from others. Repetitions
are bounded, so that no text takes long.
"""

from __future__ import annotations

import re

MASK = "***"

_NAME = r"""
    (?<![\w.-])
    (?:
        [\w.-]{0,40}? (?: (?<!by)(?<!com)pass(?!through) | passw | pwd | psw | secret | token | credential | cookie
                   | authoriz | signature | api-?_?key ) [\w.-]{0,40}
      | (?: [\w.-]{0,40}[_-] )? (?: pw | pas | key | pin | psk | sig | auth | sid | session | sas
                   | jwt | hmac | digest | response | nonce | bearer | basic )
      | [\w.-]{0,40} (?: login(?:pas|use|name|id)? | streamkey | accesskey | authkey )
      | auth[\w.-]{0,40} (?<!author) | session[_-]?id | streamid
      | user (?: [_-]?name | [_-]?id )? | usr (?: [_-]?name )? | uid | username[\w.-]{0,40} | account | proxy-id
    )
"""
_VALUE = r"""
    (?: \( s(?:tring)? \) \s* )?
    (?: \\" (?: [^"\\] | \\[^"] )* \\"
      | " (?: [^"\\] | \\. )* (?: "|$ )
      | ' (?: [^'\\] | \\. )* (?: '|$ )
      | (?: (?:basic|bearer|digest) \s+ )? (?: (?!%26) [^\s&] )*
    )
"""
# A pipeline's property ends at a space, a URL's parameter at an ampersand too.
_PROPERTY = re.compile(rf"((?<!\S){_NAME} \s* = \s* ) (?! [\"'\\(] ) \S+", re.IGNORECASE | re.VERBOSE)
_ASSIGNED = re.compile(rf"({_NAME} \s* (?:=|%3d) \s* ) {_VALUE}", re.IGNORECASE | re.VERBOSE)
_ESCAPED = re.compile(r"%(3[0-9]|[46][1-9a-f]|[57][0-9a]|2d|5f)", re.IGNORECASE)
_HEADER = re.compile(r"\b((?:proxy-)?authorization\s*:\s*)(?:\w+\s+)?\S+", re.IGNORECASE)

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # A password with spaces, between quotation marks.
    (re.compile(r"""(["'][\w+.-]+://)[^"'\s/?#@\[]{0,100}:[^"'/?#]{0,100}\s[^"'/?#]{0,100}@"""), rf"\1{MASK}@"),
    # The same without them.
    (
        re.compile(r"(://)[^\s/?#@\[]{0,100}:(?!\s|\d{1,5}[\s/?#])[^/?#\n]{0,100}[ \t][^/?#\n]{0,100}@(?=[\w\[])"),
        rf"\1{MASK}@",
    ),
    # One with ? or # in it: what stands behind the colon is no port.
    (re.compile(r"(://)[^\s/?#@\[]{0,100}:(?!\d*(?:[/?#\s]|$))\S{0,300}@"), rf"\1{MASK}@"),
    # One with a slash in it.
    (re.compile(r"(://)[^\s/?#@\[]{0,100}:[^\s?#]{0,300}@"), rf"\1{MASK}@"),
    (re.compile(r"(://)[^/?#\s]{0,300}@"), rf"\1{MASK}@"),
    # Without a scheme, or with one that is mistyped.
    (re.compile(r"[^\s:/@\"'=]{1,100}:[^\s/@\"']{1,300}@(?=[\w\[])"), f"{MASK}@"),
    # In a URL's path and query, name and password as such; a colon and a short number is something else.
    (
        re.compile(
            r"(://[^\s/?#]{1,300}/(?:[^\s?#]{0,300}/)?)[^\s/:?#=&]{1,100}:(?!\d{1,2}(?:[/?#\s]|$))[^\s/?#]{1,300}(?=[/?#\s]|$)"
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"(://[^\s?#]{1,300}\?(?:\S{0,300}&)?)[^\s=&:/]{1,100}:[^\s=&/]{1,300}(?=[&\s]|$)"), rf"\1{MASK}"),
    (re.compile(r"(:744[0-9]/)[\w-]+"), rf"\1{MASK}"),
    # Chat rooms and automations, where whoever knows the path may post.
    (re.compile(r"(://hooks?\.[^\s/]{1,200}/)[^\s\"'?#]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(://[^\s?#]{1,300}/(?:web)?hooks?(?:b2)?/)[^\s\"'?#]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"([?&](?:[kup]|code|hash|md5)=)[^\s&]*", re.IGNORECASE), rf"\1{MASK}"),
    # An address within an address, with its own name and password.
    (re.compile(r"(%3a%2f%2f)[^\s&/?#]{1,300}?%40", re.IGNORECASE), rf"\1{MASK}%40"),
    (_HEADER, rf"\1{MASK}"),
    (_PROPERTY, rf"\1{MASK}"),
    (_ASSIGNED, rf"\1{MASK}"),
)

_PATH = re.compile(r"://[^\s\"'?#]{1,600}")
_LONG_SEGMENT = re.compile(r"(?<=[^/:]/)[\w-]{20,}(?=/|$)")
_LETTERS_OR_DIGITS = re.compile(r"[^\W\d_]+|\d+")
_MIXED = 4
"""Runs of letters and of digits from which on a long segment is taken for a key: names have a number at their end."""


def _mask_key(segment: re.Match[str]) -> str:
    return MASK if len(_LETTERS_OR_DIGITS.findall(re.sub(r"[-_]", "", segment[0]))) >= _MIXED else segment[0]


def without_secrets(text: str) -> str:
    """An address, or a text that holds some, with ``***`` in place of users, passwords, keys and tokens.

    Letters and digits that an address writes as ``%61`` come back as letters: a name is the same in both forms.
    """
    text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)
    for pattern, masked in _RULES:
        text = pattern.sub(masked, text)
    return _PATH.sub(lambda path: _LONG_SEGMENT.sub(_mask_key, path[0]), text)
