# A line on a Jetson with JetPack 6 (L4T r36): TensorRT comes with the base. Build on the Jetson, from the repository's
# root, and run with --runtime nvidia:
#   docker build -f deploy/docker/edge-jetson.Dockerfile -t edgeflame-edge-jetson:0.1.0 .
# Build the engine on this very device before the first part: `edgeflame export --trt`, then inspect --device tensorrt
# --engines DIR. Otherwise as edge-cpu.Dockerfile. `make pin-images` writes the digest that the tag has today behind it.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

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
ARG LOCK=line-jetpack6.txt
RUN python3 -m venv --system-site-packages /opt/edgeflame/venv \
    && deploy/docker/install.sh /opt/edgeflame/venv "${LOCK}" ".[${EXTRAS}]" "cuda-bindings>=12.6,<13" "onnx>=1.16"

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
ENV PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=all
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["/opt/edgeflame/venv/bin/python", "-I", "/opt/edgeflame/healthcheck.py", "http://127.0.0.1:8080/healthz"]
ENTRYPOINT ["/opt/edgeflame/venv/bin/python", "-I", "-m", "edgeflame"]
CMD ["inspect", "--help"]
