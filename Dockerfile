# The service, as `jepakit serve` runs it, non-root.
#
#   docker build -t jepakit .                                        CPU, and the GPU runtime without CUDA
#   docker build -t jepakit --build-arg EXTRAS=serve,codecs,gpu .           with CUDA and cuDNN from pip wheels
#   docker run --shm-size 256m -p 127.0.0.1:8000:8000 -v "$PWD/bundles:/bundles:ro" -v "$PWD/keys:/keys:ro" jepakit
#
# `keys` holds the lines of `jepakit serve --new-key NAME`. Publish no other port: Ray's own listen inside.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS build
ARG EXTRAS=serve,codecs
WORKDIR /src
COPY . .
RUN sh docker/install.sh /opt/jepakit "${EXTRAS}"

FROM ${BASE}
RUN useradd --uid 10001 --create-home jepakit
COPY --from=build /opt/jepakit /opt/jepakit
ENV PATH=/opt/jepakit/bin:${PATH} PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=5)"]
ENTRYPOINT ["jepakit", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/bundles", "--api-key-file", "/keys"]
