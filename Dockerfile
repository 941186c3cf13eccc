# Two images from one file.
#
#   docker build -t jepakit .                                                      the service, on CPUs
#   docker build -t jepakit:gpu --build-arg EXTRAS=serve,codecs,tracing,gpu .      with CUDA and cuDNN, from pip wheels
#   docker build -t jepakit:train --target train .                                 `jepakit adapt` and `export`, with torch:
#     docker run --rm --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/work" -w /work jepakit:train adapt scans --out runs/scans
#     on a GPU also --gpus all
#
# BASE is any image with Python 3.11 or newer as `python3` and its `venv`; pin it by digest where that matters:
#   --build-arg BASE=python:3.12-slim-bookworm@sha256:…
#
# How to run it: compose.yaml and docs/operate.md. Publish no other port than 8000: Ray's own listen inside.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS source
WORKDIR /src
COPY . .

FROM source AS serve-build
ARG EXTRAS=serve,codecs,tracing
RUN sh docker/install.sh /opt/jepakit "${EXTRAS}"

FROM source AS train-build
ARG TRAIN_EXTRAS=train,lora,codecs,parquet
RUN sh docker/install.sh /opt/jepakit "${TRAIN_EXTRAS}"

# What both images are but for their packages. Nothing in them is written to while they run: the root may be
# read-only with a tmpfs on /tmp, which is also the user's home.
FROM ${BASE} AS common
RUN useradd --uid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin jepakit
ENV PATH=/opt/jepakit/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DO_NOT_TRACK=1 ORT_DISABLE_TELEMETRY=1
LABEL org.opencontainers.image.title=jepakit org.opencontainers.image.licenses=Apache-2.0
STOPSIGNAL SIGTERM
ENTRYPOINT ["jepakit"]

FROM common AS train
COPY --from=train-build /opt/jepakit /opt/jepakit
USER 10001:10001
CMD ["adapt", "--help"]

# The last one: what a build without --target makes.
FROM common AS serve
COPY --from=serve-build /opt/jepakit /opt/jepakit
COPY docker/healthcheck.py /opt/jepakit/healthcheck.py
USER 10001:10001
# Settings of the service. Other machines can reach it, so it does not start without a key file.
ENV JEPAKIT_SERVE_HOST=0.0.0.0 JEPAKIT_SERVE_PORT=8000 JEPAKIT_SERVE_API_KEY_FILE=/keys/keys
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s CMD ["python", "/opt/jepakit/healthcheck.py"]
CMD ["serve", "/bundles"]
