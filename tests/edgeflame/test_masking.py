"""No secret of an address is shown, however its maker writes it; and what is none stays readable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeflame.masking import without_secrets

SECRET = "s3cr.et!"
HOST = "192.168.1.64"

WITH_SECRETS = [
    # In the URL's own place, encoded or not.
    f"rtsp://admin:{SECRET}@{HOST}:554/Streaming/Channels/101",
    f"rtsp://admin:p%40{SECRET}@{HOST}/live",
    f"rtsp://admin:a@{SECRET}@{HOST}/live",
    f"rtsp://admin:a/{SECRET}@{HOST}/live",
    f"rtsp://admin:a?b#{SECRET}@{HOST}/live?x=1",
    f"rtsp://admin:1?{SECRET}@{HOST}/live",
    f"rtsp://user:{SECRET}`~!@#$%^&*()-_;',.<>:\"{{}}[]@@{HOST}:554/live",
    f"rtsp://:{SECRET}@{HOST}/live",
    f"rtsp://{SECRET}@{HOST}/live",
    f'rtspsrc location="rtsp://admin:my {SECRET}@{HOST}/live" latency=0',
    f"rtsp://admin:my {SECRET}@{HOST}/live",
    f"could not open rtsp://admin:my own {SECRET}@{HOST}:554/live: no answer",
    f"rtsp:/admin:{SECRET}@{HOST}/live",
    f"admin:{SECRET}@{HOST}/live",
    f"mqtts://line:{SECRET}@broker",
    f"turn-server=turn://me:{SECRET}@relay:3478",
    # Query strings.
    f"rtsp://{HOST}/cam/realmonitor?channel=1&subtype=0&user=admin&password={SECRET}",
    f"rtsp://{HOST}/h264?username=admin&passwd={SECRET}&x=1",
    f"http://{HOST}/cgi-bin/CGIProxy.fcgi?cmd=snapPicture2&usr=admin&pwd={SECRET}",
    f"http://{HOST}/cgi-bin/encoder?USER=Admin&PWD={SECRET}&SNAPSHOT",
    f"http://{HOST}/videostream.cgi?loginuse=admin&loginpas={SECRET}",
    f"http://{HOST}/videostream.cgi?user=admin&pass={SECRET}&resolution=32",
    f"http://{HOST}/video.cgi?u=admin&p={SECRET}",
    f"http://{HOST}/video.cgi?k={SECRET}",
    f"http://{HOST}/stream?userpwd={SECRET}",
    f"rtsp://{HOST}/Streaming/Channels/101?auth={SECRET}",
    f"rtsp://{HOST}/live?token={SECRET}",
    f"rtsp://{HOST}/live?access_token={SECRET}",
    f"rtsp://{HOST}/live?X-Amz-Signature={SECRET}",
    f"rtsp://{HOST}/live?session={SECRET}",
    f"rtsp://{HOST}/live?apikey={SECRET}",
    f"rtsp://{HOST}/live?api_key={SECRET}",
    f"rtsp://{HOST}/live?wowzatokenhash={SECRET}",
    f"rtsp://{HOST}/live?psk={SECRET}",
    f"rtsp://{HOST}/live%3Fuser%3Dadmin%26password%3D{SECRET}",
    f"rtsp://{HOST}/live?admin:{SECRET}",
    # Paths.
    f"rtsp://{HOST}:554/user=admin&password={SECRET}&channel=1&stream=0.sdp?real_stream",
    f"rtsp://{HOST}:554//user=admin_password={SECRET}_channel=1_stream=0.sdp",
    f"rtsp://{HOST}:554/0/admin:{SECRET}/main",
    f"rtsp://{HOST}:554/admin:{SECRET}",
    "rtsps://192.168.1.1:7441/s3cretKey123?enableSrtp",
    f"srt://{HOST}:9000?mode=caller&passphrase={SECRET}",
    f"rtmp://{HOST}/live?streamkey={SECRET}",
    "https://relay.example/live/s3cr81c0-77d2-4f0e-9a6b-1c2d3e4f5a6b/index.m3u8",
    "https://relay.example/v1/s3cr9fKx02LmQ7vBt5Ra",
    # Web services.
    f"https://hooks.chat.example/services/T0/B0/{SECRET}",
    f"https://tenant.webhook.office.example/webhookb2/me@tenant/IncomingWebhook/{SECRET}/guid",
    f"https://chat.example/api/webhooks/123/{SECRET}",
    f"https://automation.example/webhook/{SECRET}",
    f"https://functions.example/api/results?code={SECRET}",
    f"http://{HOST}/snap?p%61ss%77ord={SECRET}",
    f"http://{HOST}/snap?%70%77d={SECRET}",
    *(f"http://{HOST}/snap?{name}={SECRET}" for name in ("jwt", "hmac", "sas", "bearer", "basic", "digest", "nonce")),
    f"rtsp://{HOST}/live?nonce=1&response={SECRET}",
    f"http://{HOST}/relay?to=http%3A%2F%2Fme%3A{SECRET}%40{HOST}",
    # Pipelines.
    f"rtspsrc location=rtsp://{HOST}/live user-id=admin user-pw={SECRET} ! decodebin",
    f'rtspsrc location=rtsp://{HOST}/live user-id="admin" user-pw="two {SECRET}" ! decodebin',
    f'rtspsrc user-pw="quoted \\" {SECRET}" ! decodebin',
    f"rtspsrc user-pw='two {SECRET}' ! decodebin",
    f"rtspsrc user-pw = {SECRET} ! decodebin",
    f"rtspsrc user-pw=a&{SECRET} ! decodebin",
    f"rtspsrc proxy=http://{HOST} proxy-id=me proxy-pw={SECRET}",
    f'souphttpsrc extra-headers="headers,Authorization=(string)\\"Basic {SECRET}\\"" ! jpegdec',
    f'souphttpsrc extra-headers="headers,Authorization=Basic {SECRET}" ! jpegdec',
    f"souphttpsrc cookies={SECRET} ! jpegdec",
    f"srtsrc uri=srt://{HOST}:9000 passphrase={SECRET}",
    f"awss3src access-key=AKIA secret-access-key={SECRET}",
    f"whepsrc auth-token={SECRET}",
    # What others say of it.
    f"Could not open rtsp://admin:{SECRET}@{HOST}/live for reading",
    f"401: Authorization: Basic {SECRET}",
    f"401: Authorization: {SECRET}",
]


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_no_secret_is_left(text: str) -> None:
    masked = without_secrets(text)
    assert "s3cr" not in masked, masked
    assert "***" in masked


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://cam/live?mail=me@cam",
        "rtsp://192.168.1.64:554/Streaming/Channels/101?transportmode=unicast",
        "rtsp://[fe80::1]:554/live",
        "rtsp://10.0.0.1:554/videoinput_1:0/h264_1/media.stm",
        "rtsp://cam/live?start=10:00&channel=1",
        "camera:0?width=1280&height=720&fps=30&exposure=5000",
        "camera:/dev/v4l/by-id/usb-Maker_Model-video-index0",
        "gst:v4l2src device=/dev/video0 ! image/jpeg,width=1280 ! jpegdec",
        "videotestsrc pattern=ball ! x264enc key-int-max=30 bypass=1 ! identity passthrough=true",
        "watch:/var/spool/parts?after=move",
        "C:/parts/a.png",
        "/data/2026-01-02T10:20:30/part.png",
        "http://mes.local/api/v1/inspection-results-of-line-12",
        "rtsp://cam-of-the-second-line-12a34b56c/live",
        "rtsp://cam:554 does not answer; ask me@plant",
        "https://mes.local: cannot connect; ask me@plant",
        "the token of the page: see operator-token",
        "webhook: http://mes.local/inspection/results: answered 503",
        "/etc/edgeflame/hooks/before-start",
        "mqtt: the broker 127.0.0.1:1883 refuses the connection",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_the_rest_of_an_address_can_still_be_read() -> None:
    assert without_secrets("rtsp://me:pw@cam:554/live?x=1") == "rtsp://***@cam:554/live?x=1"
    assert without_secrets("rtsp://cam/live?user=me&pwd=pw&x=1") == "rtsp://cam/live?user=***&pwd=***&x=1"
    assert without_secrets("rtspsrc user-pw=pw latency=0 ! x") == "rtspsrc user-pw=*** latency=0 ! x"


@given(st.text(max_size=300))
def test_any_text_is_taken(text: str) -> None:
    without_secrets(text)


@pytest.mark.parametrize(
    "text", ["://" + "a:" * 9999, "pass" * 9999, '="' * 9999, "a:b@" * 9999, "?a" * 9999, "://a:b c" * 9999]
)
def test_a_long_text_takes_no_time_to_speak_of(text: str) -> None:
    without_secrets(text)
