# A line that judges on the CPU. Build from the repository's root:
#   docker build -f deploy/docker/edge-cpu.Dockerfile -t edgeflame-edge:0.1.0 .
# Its configuration needs [web] with listen = "0.0.0.0:8080": the health check asks there. Cameras: --device /dev/video0
# and --group-add video; images are handed over in shared memory: --shm-size 512m.
# `make pin-images` writes the digest that the tag has today behind it.
ARG BASE=debian:12-slim

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY edgeflame edgeflame
COPY boards boards
COPY cli cli
COPY fitting fitting
COPY fleet fleet
COPY trainer trainer
COPY aggregator aggregator
COPY export export
COPY edge edge
COPY deploy/locks deploy/locks
COPY deploy/docker/install.sh deploy/docker/install.sh
ARG EXTRAS=cpu,web,plc,video,sign
# Empty: the newest of everything that fits the extras, unchecked.
ARG LOCK=line.txt
RUN python3 -m venv /opt/edgeflame/venv \
    && deploy/docker/install.sh /opt/edgeflame/venv "${LOCK}" ".[${EXTRAS}]"

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/edgeflame --create-home --shell /usr/sbin/nologin edgeflame
COPY --from=build /opt/edgeflame /opt/edgeflame
COPY deploy/docker/healthcheck.py /opt/edgeflame/healthcheck.py
USER 10001
WORKDIR /var/lib/edgeflame
VOLUME /var/lib/edgeflame
EXPOSE 8080
ENV PYTHONUNBUFFERED=1
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["/opt/edgeflame/venv/bin/python", "-I", "/opt/edgeflame/healthcheck.py", "http://127.0.0.1:8080/healthz"]
ENTRYPOINT ["/opt/edgeflame/venv/bin/python", "-I", "-m", "edgeflame"]
CMD ["inspect", "--help"]
