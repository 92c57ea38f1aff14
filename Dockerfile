# es_flipout in a container; docs/docker.md says how to build and run it.
#   DEBIAN       release of the base image (bookworm has Python 3.11, the version that CI tests)
#   EXTRAS       extras of es-flipout to install
#   TORCH_INDEX  one more package index, for another build of torch than the default one (CPU only, another CUDA)
ARG DEBIAN=bookworm

FROM debian:${DEBIAN}-slim AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY constraints.txt ./
# torch comes first and alone: it is most of the image and changes least, and nothing installed later brings another build.
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"; fi; pip install --constraint constraints.txt torch
COPY . ./
ARG EXTRAS=ray,gpu,pixels,test
RUN pip install --constraint constraints.txt ".[$EXTRAS]"
# What runs from a checkout: the scripts, and the tests with their settings.
RUN mkdir /opt/checkout && mv pyproject.toml constraints.txt scripts tests /opt/checkout

FROM debian:${DEBIAN}-slim
# EGL renders without a display; Triton compiles the stubs of its kernels with gcc when it first starts them; Ray's cluster
# launcher copies files with rsync, and its login shells take their path from /etc/profile.d.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev libegl1 libgl1 python3 python3-dev rsync \
    && rm -rf /var/lib/apt/lists/* \
    && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/es-flipout.sh \
    && useradd --create-home --shell /bin/bash --uid 1000 es \
    && mkdir /home/es/runs /home/es/.cache \
    && chown es:es /home/es/runs /home/es/.cache
# The user's own, so that more packages can be added in a running container.
COPY --from=build --chown=1000:1000 /opt/venv /opt/venv
COPY --from=build --chown=1000:1000 /opt/checkout /opt/checkout
# Compiled kernels of Triton, torch.compile and warp are all kept in /home/es/.cache.
ENV TRITON_CACHE_DIR=/home/es/.cache/triton TORCHINDUCTOR_CACHE_DIR=/home/es/.cache/inductor
# "graphics" lets NVIDIA's container toolkit bring the driver's EGL along.
ENV PATH=/opt/venv/bin:$PATH MUJOCO_GL=egl NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/es
VOLUME /home/es/runs
CMD ["es-flipout", "train", "HalfCheetah-v5"]
