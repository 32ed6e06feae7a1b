# shoal in a container. It computes on the CPU; for NVIDIA GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --tag shoal .
# docs/service.md says how to run it.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/shoal
WORKDIR /source
COPY constraints.txt ./
# PyTorch first: it is most of the image, and stays when shoal changes.
# Its index has other versions of what PyTorch needs than constraints.txt names: the step below corrects them.
RUN grep '^torch==' constraints.txt > torch.txt \
    && /opt/shoal/bin/pip install --index-url "$TORCH_INDEX" --constraint torch.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/shoal/bin/pip install --constraint constraints.txt .

FROM python:${PYTHON}-slim
# bitsandbytes, which quantizes, needs OpenMP.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home shoal \
    && install --directory --owner=shoal --group=shoal /data
COPY --from=build /opt/shoal /opt/shoal
ENV PATH=/opt/shoal/bin:$PATH SHOAL_CACHE=/data/shoal HF_HOME=/data/huggingface
USER shoal
WORKDIR /home/shoal
# Identities, weights from members, measured speeds, and models from the hub.
VOLUME /data
# The port of the swarm, for `--port 31337`.
EXPOSE 31337
STOPSIGNAL SIGTERM
ENTRYPOINT ["shoal"]
CMD ["--help"]
