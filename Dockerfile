# docker build --tag block-admm . && mkdir -p outputs
# docker run -it --rm --user "$(id -u):$(id -g)" --volume "$PWD/outputs:/block-admm/outputs" block-admm
# Without -it Ctrl-C stops nothing, as make does not hand it on. With rootless Docker or Podman leave --user out.
FROM python:3.12-slim
# PyTorch's own index has a build for the processor alone, which is a tenth of the size.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /block-admm
COPY . .
RUN make env
# A --user has no home folder in the image, and Matplotlib writes into one.
ENV HOME=/tmp
CMD ["make", "demo"]
