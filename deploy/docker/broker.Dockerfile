# Mosquitto as the fleet's configuration is tested with: Debian's 2.0.11 with the dynamic-security plugin.
# `edgeflame fleet init` writes the folder that is mounted at /etc/mosquitto/edgeflame.
# `make pin-images` writes the digest that the tag has today behind it.
ARG BASE=debian:12-slim

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends mosquitto \
    && rm -rf /var/lib/apt/lists/* \
    && usermod --uid 10002 mosquitto
USER 10002
EXPOSE 8883
# Whether it listens (8883 is 22B3), without a connection that its log would call broken.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["grep", "-q", ":22B3 .* 0A ", "/proc/net/tcp"]
ENTRYPOINT ["/usr/sbin/mosquitto"]
CMD ["-c", "/etc/mosquitto/edgeflame/mosquitto.conf"]
